#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace nanogpt {
namespace {

constexpr double kLargestLogit = 1e30;

// e^x for x <= 0, to the last place or two; no library's own, so that every machine draws the same.
double exp_negative(double x) {
  if (!(x > -708.0)) return 0.0;
  const double shifted = x * 1.4426950408889634 + 6755399441055744.0;  // 1.5 * 2^52: rounds to an integer
  int64_t n;
  std::memcpy(&n, &shifted, 8);
  n = (n & 0xffffffff) << 32 >> 32;
  const double nd = shifted - 6755399441055744.0;
  const double r = (x - nd * 6.93147180369123816490e-01) - nd * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;
  for (const double c : {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                         1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
    p = p * r + c;
  const uint64_t bits = uint64_t(n + 1023) << 52;
  double scale;
  std::memcpy(&scale, &bits, 8);
  return p * scale;
}

// Ids of padding rows have no place in `row` and are never drawn: nothing is to be done for them.
void adjust(float* row, int num_tokens, const Sampling& s, std::vector<int32_t>& ids) {
  for (const auto& [id, bias] : s.logit_bias)
    if (id < num_tokens) row[id] = float(std::clamp(double(row[id]) + bias, -kLargestLogit, kLargestLogit));
  if (s.repetition_penalty != 1.0) {
    ids = s.prompt;
    ids.insert(ids.end(), s.output.begin(), s.output.end());
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    for (const int32_t id : ids) {
      if (id >= num_tokens) break;
      const double x = row[id];
      row[id] = float(x > 0 ? x / s.repetition_penalty : x * s.repetition_penalty);
    }
  }
  if (s.presence_penalty != 0 || s.frequency_penalty != 0) {
    ids = s.output;
    std::sort(ids.begin(), ids.end());
    for (size_t i = 0, j; i < ids.size() && ids[i] < num_tokens; i = j) {
      for (j = i; j < ids.size() && ids[j] == ids[i];) j++;
      row[ids[i]] = float(double(row[ids[i]]) - (s.presence_penalty + s.frequency_penalty * double(j - i)));
    }
  }
  for (int word = 0; s.allowed && word * 32 < num_tokens; word++) {
    const uint32_t allowed = s.allowed[word];
    if (allowed == 0xffffffff) continue;
    for (int i = word * 32; i < std::min(num_tokens, word * 32 + 32); i++)
      if (!(allowed >> (i % 32) & 1)) row[i] = -INFINITY;
  }
}

// Places of logits that are `bound` or more, ascending. Only where a lane's maximum reaches it are its logits read.
template <class Visit>
void visit_from(const float* x, int n, const std::vector<float>& maxima, float bound, const Visit& visit) {
  for (int block = 0; block * 256 < n; block++) {
    const float* m = maxima.data() + block * 16;
    bool any = false;
    for (int lane = 0; lane < 16; lane++) any |= m[lane] >= bound;
    if (!any) continue;
    for (int i = block * 256; i < std::min(n, block * 256 + 256); i++)
      if (x[i] >= bound) visit(i);
  }
}

void largest(const float* x, int n, int64_t k, SamplerScratch& s) {
  s.ids.clear();
  if (k >= n) {
    s.ids.resize(n);
    std::iota(s.ids.begin(), s.ids.end(), 0);
    return;
  }
  // The k-th largest maximum of disjoint sets bounds the k-th largest logit from below, and few logits reach it.
  // Below every finite logit, and above those that are not allowed: they have no weight.
  float bound = std::numeric_limits<float>::lowest();
  if (k <= int64_t(s.maxima.size())) {
    s.largest.resize(k);
    std::partial_sort_copy(s.maxima.begin(), s.maxima.end(), s.largest.begin(), s.largest.end(), std::greater<>());
    bound = std::max(bound, s.largest.back());
  }
  visit_from(x, n, s.maxima, bound, [&](int i) { s.ids.push_back(i); });
  if (int64_t(s.ids.size()) > k) {
    std::nth_element(s.ids.begin(), s.ids.begin() + k, s.ids.end(),
                     [x](int32_t a, int32_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; });
    s.ids.resize(k);
    std::sort(s.ids.begin(), s.ids.end());
  }
}

// Zeroes the weights outside the smallest set of the most probable ids whose share reaches top_p.
void nucleus(std::vector<double>& weights, double top_p, std::vector<int32_t>& order) {
  const double goal = top_p * std::accumulate(weights.begin(), weights.end(), 0.0);
  order.resize(weights.size());
  std::iota(order.begin(), order.end(), 0);
  const auto better = [&](int32_t a, int32_t b) { return weights[a] != weights[b] ? weights[a] > weights[b] : a < b; };
  // A few are nearly always enough; sorting goes on only as far as they are not.
  size_t sorted = 0, kept = 0;
  double reached = 0;
  for (size_t few = 512; sorted < order.size(); few *= 8) {
    const size_t end = std::min(order.size(), few);
    std::partial_sort(order.begin() + sorted, order.begin() + end, order.end(), better);
    sorted = end;
    while (kept < sorted) {
      reached += weights[order[kept++]];
      if (reached >= goal) {
        for (size_t i = kept; i < order.size(); i++) weights[order[i]] = 0;
        return;
      }
    }
  }
}

}  // namespace

double uniform(uint64_t seed, uint64_t index) {
  uint32_t c[4] = {uint32_t(index), uint32_t(index >> 32), 0, 0};
  uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t(0xD2511F53) * c[0], p1 = uint64_t(0xCD9E8D57) * c[2];
    const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ key[0], uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ key[1],
                              uint32_t(p0)};
    std::memcpy(c, next, sizeof c);
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return double((uint64_t(c[0]) | uint64_t(c[1]) << 32) >> 11) * 0x1p-53;
}

int32_t sample(const float* logits, int num_tokens, const Sampling& p, LaneMaxima lane_maxima, SamplerScratch& s) {
  const int padded = (num_tokens + 15) / 16 * 16;
  const float* x = logits;
  if (padded != num_tokens || p.changes_logits()) {
    s.row.assign(logits, logits + num_tokens);
    s.row.resize(padded, -INFINITY);
    adjust(s.row.data(), num_tokens, p, s.order);
    x = s.row.data();
  }
  s.maxima.resize((padded + 255) / 256 * 16);
  lane_maxima(x, padded, s.maxima.data());
  const float top = *std::max_element(s.maxima.begin(), s.maxima.end());
  if (p.temperature == 0) {
    int32_t first = -1;
    visit_from(x, num_tokens, s.maxima, top, [&](int i) { first = first < 0 ? i : first; });
    return std::max(first, 0);  // 0 where every logit is NaN
  }
  largest(x, num_tokens, p.top_k > 0 ? p.top_k : num_tokens, s);
  if (s.ids.empty()) return 0;
  s.weights.resize(s.ids.size());
  for (size_t i = 0; i < s.ids.size(); i++)
    s.weights[i] = exp_negative((double(x[s.ids[i]]) - double(top)) / p.temperature);
  if (p.top_p < 1) nucleus(s.weights, p.top_p, s.order);
  if (p.min_p > 0)
    for (double& weight : s.weights)
      if (weight < p.min_p) weight = 0;
  double total = 0;
  for (const double weight : s.weights) total += weight;
  const double target = uniform(p.seed, p.index) * total;
  double reached = 0;
  size_t last = 0;
  for (size_t i = 0; i < s.ids.size(); i++) {
    reached += s.weights[i];
    if (reached > target) return s.ids[i];
    if (s.weights[i] > 0) last = i;
  }
  return s.ids[last];
}

}  // namespace nanogpt
