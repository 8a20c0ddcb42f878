// A packed model with its K/V slots and its threads: everything behind one runner. Not thread safe: one caller at a time.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "step.h"

namespace nanogpt {

// Names of the instruction sets that this build has and this machine runs, best first.
std::vector<std::string> usable_isas();

struct BatchView {
  int num_spans = 0;
  const int32_t *slots = nullptr, *starts = nullptr, *num_tokens = nullptr, *token_ids = nullptr;
};

// Rows of a batch (places in token_ids) to draw a token from.
struct Draws {
  std::vector<int32_t> rows;
  std::vector<Sampling> sampling;
  std::vector<int32_t> drawn;  // the answer
};

// Memory straight from the operating system: zero, committed as it is touched, and given back when this ends. A heap
// may keep what was freed.
class Pages {
 public:
  Pages() = default;
  explicit Pages(size_t bytes);  // throws std::bad_alloc
  Pages(Pages&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Pages& operator=(Pages other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Pages();
  uint8_t* data() const { return data_; }
  // Whole pages of [begin, end) are zero again, and take no memory until they are touched.
  void give_back(size_t begin, size_t end);

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

class Model {
 public:
  // `packed` must outlive the model. Throws std::invalid_argument for an instruction set that cannot run here.
  Model(const Config& config, const std::vector<Kind>& kinds, const uint8_t* packed, int num_slots, int threads,
        const std::string& isa);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  // Computes the batch's tokens, writes their K and V, and draws. Logits of the drawn rows stay in `logits`.
  void step(const BatchView& batch, Draws& draws);
  // Logits of rows of the last batch, [rows, ld_logits()], into a buffer that the next call overwrites.
  const float* head(const int32_t* rows, int num_rows);
  const float* logits() const { return logits_.data(); }
  void copy_prefix(int source, int target, int num_tokens);

  const Config& config() const { return weights_.config; }
  size_t ld_logits() const { return size_t(weights_.head.n_pad); }
  // From now on the time of each part of the steps is counted, from zero.
  void time_parts() {
    part_ns_.assign(kNumParts, 0);
    step_.part_ns = part_ns_.data();
  }
  const std::vector<int64_t>& part_ns() const { return part_ns_; }  // in the order of Part
  int spare_slot() const { return num_slots_; }  // one slot more than asked for, for `logits`
  int num_slots() const { return num_slots_; }
  const char* isa() const { return isa_->name; }
  Team& team() { return team_; }

 private:
  void reserve(int rows);
  void want_logits(const int32_t* rows, int num_rows);
  void make_tasks();
  void give_back_kv(const Span& span);
  Weights weights_;
  KvGeometry kv_;
  int num_slots_;
  const Isa* isa_;
  Team team_;
  Pages kv_memory_;
  std::vector<int> kv_blocks_;  // of each slot, from its first: those that may have been written
  int reserved_rows_ = 0, small_steps_ = 0;  // small: steps in a row that needed less than half of the buffers
  Pages rows_memory_;
  std::unique_ptr<uint8_t[]> thread_memory_;
  std::vector<float> logits_;
  std::vector<int64_t> part_ns_;
  std::vector<int32_t> positions_;
  std::vector<Span> spans_;
  std::vector<Task> tasks_;
  std::vector<Scratch> scratch_;
  std::vector<SamplerScratch> sampler_scratch_;
  Step step_{};
};

}  // namespace nanogpt
