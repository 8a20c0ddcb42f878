// One model step as plain pointers: what runner.cc hands to an instruction set's `forward`. Owns nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"
#include "pool.h"
#include "sampler.h"

namespace nanogpt {

// A sequence's part of the batch: rows row0 .. row0 + n hold its tokens at positions start ..
struct Span {
  int slot, start, row0, n;
  bool kv_first;  // its rows are split over several attention tasks, so K and V must be written before them
};

// A piece of attention: heads [head0, head1) of rows [row0, row1) of the batch, all of one span.
struct Task {
  int span, head0, head1, row0, row1;
};

// Buffers of one thread.
struct Scratch {
  float* row;      // one row of floats, the widest matrix input
  uint8_t* act;    // quantized rows of its own: small batches are prepared by every thread for itself
  float* act_scale;
  int32_t* act_offset;
  float* scores;   // kScratchRows rows of block_size
  uint8_t* att_act;
  float* out;      // kScratchRows rows of a head's output
};

constexpr int kScratchRows = 16;  // rows that attention takes at once at most: a tile of AMX
constexpr int kOwnRows = 4;  // batches up to this are normalized by every thread for itself: cheaper than a barrier

// Parts of a step whose time can be asked for.
enum class Part { kEmbedding, kQkv, kAttention, kProj, kFc, kFcProj, kHead, kSampling };
constexpr int kNumParts = 8;

struct Step {
  const Weights* weights;
  KvGeometry kv;
  uint8_t* kv_base;
  int num_rows;
  const int32_t* tokens;
  const int32_t* positions;
  int num_spans;
  const Span* spans;
  int num_tasks;
  const Task* tasks;
  bool any_kv_first;
  int num_out;             // rows whose logits are wanted
  const int32_t* out_rows;
  float* logits;
  size_t ld_logits;
  float *x, *qkv, *att, *h;
  size_t ldx, ldqkv, ldh;
  uint8_t* act;
  size_t act_stride;
  float* act_scale;
  int32_t* act_offset;
  Scratch* scratch;  // one a thread
  Team* team;
  // After the head, if a token is to be drawn from each of its rows.
  const Sampling* sampling;
  SamplerScratch* sampler_scratch;  // one a thread
  int32_t* drawn;
  const struct Isa* isa;
  int64_t* part_ns;  // nanoseconds of each part, counted up by thread 0; or null
};

// Counts the time since the last lap for a part. Out of line, because the clock's own code must not be compiled for one
// instruction set.
void lap(const Step& step, const Cursor& cursor, Part part, int64_t& last);

struct Isa {
  const char* name;
  void (*forward)(const Step& step, Cursor& cursor, int64_t& last);  // all layers; `last`: see lap
  void (*head)(const Step& step, Cursor& cursor);     // logits of out_rows of the last forward
  LaneMaxima lane_maxima;
  size_t row_group_bytes;  // the most that a group of 64 inputs takes in a quantized row
};

}  // namespace nanogpt
