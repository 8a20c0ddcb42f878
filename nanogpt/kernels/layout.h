// What a packed model is: the one memory layout that every instruction set computes on.
//
// A matrix [out, in] lies in panels of 16 output columns. Inside a panel, groups of four inputs follow each other:
// 64 bytes = 16 columns x 4 inputs. That is at once an AMX tile's row, one VNNI register, and four NEON dot-product
// registers, so one packed file serves every machine. Inputs are padded with zeros to a multiple of 64.
//
// The whole layout is a pure function of the configuration and the kinds of its matrices: the packed file holds no
// offsets, so a damaged file can give wrong numbers but never a wrong address.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace nanogpt {

constexpr int kLanes = 16;           // columns of a panel, and lanes of every float sum
constexpr int kDepth = 64;           // inputs are padded to this
constexpr int kGroup = 64;           // inputs that share an exponent, or an int4 scale
constexpr int kLeafTokens = 64;      // tokens of one K/V leaf
constexpr int kLaneInputs = 8;       // inputs that one lane of 16 bits sums up (activations_avx2.h)
constexpr int kActMax = 16383;       // activations are integers of 15 bits with the sign
constexpr size_t kGroupBytes = 544;  // an int4 group of a panel: 512 of weights, 16 bf16 scales

template <class T>
constexpr T round_up(T value, T unit) {
  return (value + unit - 1) / unit * unit;
}

enum class Kind : int32_t { kF32 = 0, kI8 = 1, kI4 = 2 };

struct Config {
  int n_layer = 0, n_head = 0, n_embd = 0, block_size = 0, vocab_size = 0, num_tokens = 0, n_inner = 0;
  bool bias = true, erf = false, tied = true;
  float eps = 1e-5f;
  int head_size() const { return n_embd / n_head; }
};

// A packed matrix. `act_max` is how large a quantized activation may be for the int32 sum to be exact whatever the
// input is (see pack.cc). `lane_limits`, of int8 alone: the same for a lane's int16 sum, what the squares of its eight
// activations may add up to; two lanes for every 16 inputs.
struct Matrix {
  Kind kind = Kind::kI8;
  int n = 0, k = 0, n_pad = 0, k_pad = 0;
  int act_max = kActMax;
  size_t panel_bytes = 0;
  const uint8_t* data = nullptr;
  const float* scale = nullptr;
  const float* bias = nullptr;
  const int32_t* lane_limits = nullptr;
  int num_panels() const { return n_pad / kLanes; }
};

struct Layer {
  const float *ln1_w, *ln1_b, *ln2_w, *ln2_b;
  Matrix qkv, proj, fc, fc_proj;
};

struct Weights {
  Config config;
  std::vector<Layer> layers;
  const float *lnf_w, *lnf_b, *wpe;
  Matrix wte, head;  // the same when tied
};

// One named piece of the packed buffer. A matrix has its weights at `offset`, then scale, bias, act_max, lane_limits.
struct Entry {
  std::string name;
  bool is_matrix;
  Kind kind;
  int n, k;       // a vector has n = rows, k = width
  size_t offset;  // multiples of 64
  size_t bytes;
};

class Layout {
 public:
  // `kinds` has one kind a matrix, in the order of the entries.
  Layout(const Config& config, const std::vector<Kind>& kinds);
  size_t bytes() const { return bytes_; }
  const std::vector<Entry>& entries() const { return entries_; }
  const Entry* find(const std::string& name) const;
  Weights weights(const uint8_t* base) const;
  static int num_matrices(const Config& config) { return 4 * config.n_layer + 1 + (config.tied ? 0 : 1); }

 private:
  void add(const std::string& name, bool is_matrix, Kind kind, int n, int k);
  Config config_;
  std::vector<Entry> entries_;
  size_t bytes_ = 0;
};

size_t panel_bytes(Kind kind, int k_pad);
Matrix matrix_at(const Entry& entry, const uint8_t* base);

// K and V of one slot: blocks of 64 tokens, so that memory is touched as a sequence grows; in a block every layer,
// in a layer every head. A leaf is one head's 64 tokens: K as four panels of 16 tokens, V as panels of 16 channels,
// then the tokens' scales.
struct KvGeometry {
  bool f32 = false;
  int n_layer = 0, n_head = 0, d = 0, dk = 0, dv = 0, num_blocks = 0;
  size_t k_bytes = 0, v_bytes = 0, leaf_bytes = 0, block_bytes = 0, slot_bytes = 0;
  KvGeometry() = default;
  KvGeometry(const Config& config, bool f32);
};

}  // namespace nanogpt
