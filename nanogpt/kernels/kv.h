// Where K and V lie, and fetching what the next attention will read of them.
#pragma once

#include "rows.h"
#include "step.h"

namespace nanogpt {
namespace {

NG_INLINE uint8_t* leaf_at(const Step& s, int slot, int block, int layer, int head) {
  return s.kv_base + slot * s.kv.slot_bytes + block * s.kv.block_bytes +
         size_t(layer * s.kv.n_head + head) * s.kv.leaf_bytes;
}

// K and V that a thread's share of the next attention will read, to be fetched beside the products before it. Those of many
// sequences are larger than the L2 cache or all caches, and attention has too little to do to wait for them: no more than
// some twenty lines are on their way to a core at a time. Most go on to the L3 cache before they are read, which is near enough.
class Upcoming {
 public:
  // Of so many groups of rows (of kMaxRows) those that fetch the next weights (matmul.h). The others have K and V to fetch.
  static int num_fetching_weights(int groups) { return groups < 4 ? imin(groups, 2) : groups / 2; }

  // Nothing is upcoming before begin().
  Upcoming(const Step& step, int thread)
      : s_(step),
        first_(step.team->share_begin(step.num_tasks, thread)),
        last_(step.team->share_begin(step.num_tasks, thread + 1)) {}

  void begin(int layer) {
    const int all_groups = (s_.num_rows + kMaxRows - 1) / kMaxRows, row_groups = all_groups - num_fetching_weights(all_groups);
    if (row_groups == 0 || s_.kv.f32) return;
    if (!lines_) {
      int64_t bytes = 0, places = 0;  // groups of 64 inputs, of all panels and rows
      for (rewind(layer); next_run();) bytes += end_ - at_;
      const Layer& l = s_.weights->layers[0];
      for (const Matrix* m : {&l.qkv, &l.proj, &l.fc, &l.fc_proj})
        places += int64_t(m->num_panels()) * (m->k_pad / kGroup);
      places *= row_groups;
      const int64_t lines = bytes / 64 * s_.team->size() * (kPanelsAtOnce == 4 ? 2 : 1);
      const int64_t wanted = (lines + places - 1) / places;
      lines_ = int(wanted < kMostLines ? wanted : kMostLines);
    }
    rewind(layer);
  }
  bool any() const { return lines_ > 0; }
  // The next lines, beside so many groups of 64 inputs.
  NG_INLINE Ahead take(int groups) {
    if (!lines_ || (at_ >= end_ && !next_run())) return {};
    const uint8_t* from = at_;
    at_ += size_t(groups) * lines_ * 64;  // may end past the run: in the next layer's
    return {from, lines_};
  }

 private:
  static constexpr int kMostLines = 16;

  void rewind(int layer) {
    layer_ = layer;
    task_ = layer < s_.weights->config.n_layer ? first_ : last_;
    block_ = 0;
    at_ = end_ = nullptr;
  }
  // Heads of a block's layer lie one behind the other. A block that is less than half full is left out.
  bool next_run() {
    for (; task_ < last_; task_++, block_ = 0) {
      const Task& task = s_.tasks[task_];
      const Span& span = s_.spans[task.span];
      if (span.start < block_ * kLeafTokens + kLeafTokens / 2) continue;
      at_ = leaf_at(s_, span.slot, block_++, layer_, task.head0);
      end_ = at_ + size_t(task.head1 - task.head0) * s_.kv.leaf_bytes;
      return true;
    }
    return false;
  }

  const Step& s_;
  const int first_, last_;  // tasks
  int lines_ = 0;           // for a group of 64 inputs
  int layer_ = 0, task_ = 0, block_ = 0;
  const uint8_t *at_ = nullptr, *end_ = nullptr;  // the rest of a run
};

}  // namespace
}  // namespace nanogpt
