// From a row of logits to a token. The same steps in the same order as nanogpt/runner/sampler.py, which it is held
// against; see there for what they mean.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace nanogpt {

struct Sampling {
  double temperature = 1, top_p = 1, min_p = 0;
  int64_t top_k = 0;
  double repetition_penalty = 1, presence_penalty = 0, frequency_penalty = 0;
  std::vector<std::pair<int32_t, double>> logit_bias;
  std::vector<int32_t> prompt, output;  // filled only where a penalty needs them
  uint64_t seed = 0;
  uint64_t index = 0;  // of the output token
  // One bit an id, from the lowest bit of the first word on: only ids whose bit is set are drawn. Null: all are.
  const uint32_t* allowed = nullptr;
  bool changes_logits() const {
    return !logit_bias.empty() || repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0 ||
           allowed;
  }
};

// Buffers of one thread.
struct SamplerScratch {
  std::vector<float> row, maxima, largest;
  std::vector<int32_t> ids, order;
  std::vector<double> weights;
};

// Writes, for each 256 logits, 16 maxima: that of every sixteenth. `n` is a multiple of 16.
using LaneMaxima = void (*)(const float* logits, int n, float* maxima);

// One id under `num_tokens`. `logits` has room up to a multiple of 16; what lies past num_tokens is not looked at.
int32_t sample(const float* logits, int num_tokens, const Sampling& sampling, LaneMaxima lane_maxima,
               SamplerScratch& scratch);

double uniform(uint64_t seed, uint64_t index);

}  // namespace nanogpt
