#include "model.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>

namespace nanogpt {

const Isa* find_isa(const std::string& name);

namespace {

// Hands out pieces of one block, each on its own cache line. With a null base it only counts.
struct Carver {
  uint8_t* base;
  size_t used = 0;
  template <class T>
  T* take(size_t count) {
    used = round_up<size_t>(used, 64);
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += count * sizeof(T);
    return piece;
  }
};

int64_t now_ns() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void whole_step(const Step& s, Cursor cursor) {
  int64_t last = s.part_ns ? now_ns() : 0;
  s.isa->forward(s, cursor, last);
  if (s.num_out == 0) return;
  s.isa->head(s, cursor);
  lap(s, cursor, Part::kHead, last);
  for (int i; (i = s.team->take(cursor, s.num_out)) >= 0;)
    s.drawn[i] = sample(s.logits + i * s.ld_logits, s.weights->config.num_tokens, s.sampling[i], s.isa->lane_maxima,
                        s.sampler_scratch[cursor.thread]);
  s.team->finish(cursor, s.num_out);
  lap(s, cursor, Part::kSampling, last);
}
void head_alone(const Step& s, Cursor cursor) { s.isa->head(s, cursor); }

constexpr int kRowsAtOnce = 32, kSmallSteps = 64;
constexpr int kKeptBlocks = 2;  // K and V past a text's end that stay for it to grow into

uint8_t* aligned(uint8_t* p) { return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64; }

}  // namespace

void lap(const Step& s, const Cursor& cursor, Part part, int64_t& last) {
  if (!s.part_ns || cursor.thread) return;
  const int64_t now = now_ns();
  s.part_ns[int(part)] += now - last;
  last = now;
}

Pages::Pages(size_t bytes) : bytes_(bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(memory);
}
Pages::~Pages() {
  if (data_) munmap(data_, bytes_);
}

void Pages::give_back(size_t begin, size_t end) {
  static const size_t page = size_t(sysconf(_SC_PAGESIZE));
  begin = round_up(begin, page);
  end = end / page * page;
  if (begin < end) madvise(data_ + begin, end - begin, MADV_DONTNEED);
}

Model::Model(const Config& config, const std::vector<Kind>& kinds, const uint8_t* packed, int num_slots, int threads,
             const std::string& isa)
    : weights_(Layout(config, kinds).weights(packed)),
      kv_(config, weights_.wte.kind == Kind::kF32),
      num_slots_(num_slots),
      isa_(find_isa(isa)),
      team_(threads),
      kv_memory_(kv_.slot_bytes * (size_t(num_slots) + 1)),
      kv_blocks_(size_t(num_slots) + 1) {
  const size_t widest = round_up(std::max({config.n_embd, config.n_inner}), kDepth);
  const size_t context = round_up(config.block_size, kDepth), element = kv_.f32 ? 4 : 2;
  const size_t act_row = kv_.f32 ? widest * element : widest / kGroup * isa_->row_group_bytes + 64;
  auto carve = [&](Carver c) {
    for (Scratch& s : scratch_) {
      s.row = c.take<float>(widest + 64);
      s.act = c.take<uint8_t>(kOwnRows * act_row);
      s.act_scale = c.take<float>(kOwnRows);
      s.act_offset = c.take<int32_t>(kOwnRows);
      s.scores = c.take<float>(kScratchRows * context);
      s.att_act = c.take<uint8_t>(kScratchRows * std::max(context, size_t(round_up(kv_.dk, kDepth))) * element);
      s.out = c.take<float>(size_t(kScratchRows) * kv_.dv);
    }
    return c.used;
  };
  scratch_.resize(threads);
  thread_memory_ = std::make_unique<uint8_t[]>(carve({nullptr}) + 64);
  carve({aligned(thread_memory_.get())});
  step_.weights = &weights_;
  step_.kv = kv_;
  step_.kv_base = kv_memory_.data();
  step_.scratch = scratch_.data();
  step_.team = &team_;
  step_.isa = isa_;
  sampler_scratch_.resize(threads);
  step_.sampler_scratch = sampler_scratch_.data();
  step_.ldx = round_up(config.n_embd, kDepth);
  step_.ldqkv = round_up(3 * config.n_embd, kDepth);
  step_.ldh = round_up(config.n_inner, kDepth);
  step_.act_stride = act_row;
  step_.ld_logits = ld_logits();
}

Model::~Model() {
  team_.quiesce();
}

// Buffers for `rows`, with some room. A prompt's are given back when none has come for a while: its rows take more memory
// than the decoding of all slots, and that lasts longer.
void Model::reserve(int rows) {
  const int wanted = std::max(round_up(rows, kRowsAtOnce), kRowsAtOnce);
  small_steps_ = 2 * wanted <= reserved_rows_ ? small_steps_ + 1 : 0;
  if (wanted <= reserved_rows_ && small_steps_ < kSmallSteps) return;
  auto carve = [&](Carver c) {
    step_.x = c.take<float>(wanted * step_.ldx);
    step_.att = c.take<float>(wanted * step_.ldx);
    step_.qkv = c.take<float>(wanted * step_.ldqkv + 16);
    step_.h = c.take<float>(wanted * step_.ldh);
    step_.act = c.take<uint8_t>((wanted + 16) * step_.act_stride);  // AMX reads whole blocks of 16 rows
    step_.act_scale = c.take<float>(wanted);
    step_.act_offset = c.take<int32_t>(wanted);
    return c.used;
  };
  team_.quiesce();
  rows_memory_ = Pages();
  reserved_rows_ = 0;
  // Zero, because the columns between a width and its multiple of 64 are read and never written.
  rows_memory_ = Pages(carve({nullptr}));
  carve({rows_memory_.data()});
  reserved_rows_ = wanted;
  small_steps_ = 0;
}

// Attention in pieces of about equal work, several a thread: whole sequences where there are many, heads of a sequence
// where there are few, and rows of a long chunk where heads do not suffice.
void Model::make_tasks() {
  tasks_.clear();
  step_.any_kv_first = false;
  auto cost = [](const Span& s) { return (int64_t(s.start) + (s.n + 1) / 2 + 32) * s.n; };
  int64_t total = 0;
  for (const Span& s : spans_) total += cost(s);
  const int threads = team_.size(), heads = kv_.n_head;
  const int64_t target = threads == 1 ? INT64_MAX : std::max<int64_t>(total / (4 * threads), 1);
  for (int b = 0; b < int(spans_.size()); b++) {
    Span& s = spans_[b];
    const int64_t pieces = threads == 1 ? 1 : (cost(s) + target - 1) / target;
    const int by_head = int(std::min<int64_t>(pieces, heads));
    const int by_row = heads >= 2 * threads ? 1 : int(std::clamp<int64_t>(pieces / by_head, 1, (s.n + 23) / 24));
    s.kv_first = by_row > 1;
    step_.any_kv_first |= s.kv_first;
    for (int r = by_row - 1; r >= 0; r--)  // later rows see more tokens: the longest pieces first
      for (int h = 0; h < by_head; h++)
        tasks_.push_back({b, heads * h / by_head, heads * (h + 1) / by_head, s.row0 + s.n * r / by_row,
                          s.row0 + s.n * (r + 1) / by_row});
  }
}

// A slot's new text is often shorter than the one before. What lay behind it is no longer anybody's.
void Model::give_back_kv(const Span& span) {
  int& written = kv_blocks_[span.slot];
  const int used = (span.start + span.n + kLeafTokens - 1) / kLeafTokens, kept = used + kKeptBlocks;
  if (written > kept) {
    const size_t slot = span.slot * kv_.slot_bytes;
    kv_memory_.give_back(slot + kept * kv_.block_bytes, slot + written * kv_.block_bytes);
    written = kept;
  }
  written = std::max(written, used);
}

void Model::step(const BatchView& batch, Draws& draws) {
  spans_.clear();
  positions_.clear();
  const Config& c = config();
  int rows = 0;
  for (int b = 0; b < batch.num_spans; b++) {
    const int slot = batch.slots[b], start = batch.starts[b], n = batch.num_tokens[b];
    // Addresses are made from these: they are checked here, whatever the caller promised.
    if (slot < 0 || slot > num_slots_ || start < 0 || n < 1 || n > c.block_size || start > c.block_size - n)
      throw std::out_of_range("a sequence of the batch lies outside its slot");
    spans_.push_back({slot, start, rows, n, false});
    give_back_kv(spans_.back());
    for (int i = 0; i < n; i++) {
      const int token = batch.token_ids[rows + i];
      if (token < 0 || token >= c.vocab_size) throw std::out_of_range("a token id is not in the vocabulary");
      positions_.push_back(start + i);
    }
    rows += n;
  }
  reserve(rows);
  make_tasks();
  step_.num_rows = rows;
  step_.tokens = batch.token_ids;
  step_.positions = positions_.data();
  step_.num_spans = int(spans_.size());
  step_.spans = spans_.data();
  step_.num_tasks = int(tasks_.size());
  step_.tasks = tasks_.data();
  want_logits(draws.rows.data(), int(draws.rows.size()));
  draws.drawn.resize(draws.rows.size());
  step_.sampling = draws.sampling.data();
  step_.drawn = draws.drawn.data();
  if (rows) team_.run(step_, whole_step);
}

void Model::want_logits(const int32_t* rows, int num_rows) {
  for (int i = 0; i < num_rows; i++)
    if (rows[i] < 0 || rows[i] >= step_.num_rows) throw std::out_of_range("a row is not in the batch");
  if (logits_.size() < num_rows * ld_logits()) {
    team_.quiesce();
    logits_.resize(num_rows * ld_logits());
  }
  step_.num_out = num_rows;
  step_.out_rows = rows;
  step_.logits = logits_.data();
}

const float* Model::head(const int32_t* rows, int num_rows) {
  want_logits(rows, num_rows);
  if (num_rows) team_.run(step_, head_alone);
  return logits_.data();
}

void Model::copy_prefix(int source, int target, int num_tokens) {
  if (source < 0 || target < 0 || source >= num_slots_ || target >= num_slots_ || num_tokens < 0 ||
      num_tokens > config().block_size)
    throw std::out_of_range("copy_prefix: no such slot or too many tokens");
  if (source == target) return;
  // Whole leaves: what lies past the prefix in the last one is overwritten before it is read.
  const size_t blocks = (size_t(num_tokens) + kLeafTokens - 1) / kLeafTokens;
  std::memcpy(step_.kv_base + target * kv_.slot_bytes, step_.kv_base + source * kv_.slot_bytes, blocks * kv_.block_bytes);
  kv_blocks_[target] = std::max(kv_blocks_[target], int(blocks));
}

}  // namespace nanogpt
