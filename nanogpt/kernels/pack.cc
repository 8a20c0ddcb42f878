#include "pack.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>

namespace nanogpt {
namespace {

float to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

float largest(const float* x, int n) {
  float top = 0;
  for (int i = 0; i < n; i++) top = std::max(top, std::fabs(x[i]));
  return top;
}

// Ties to even, for |x| < 2^22 (see simd.h).
int nearest(float x) {
  const float shifted = x + 12582912.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  return bits - 0x4b400000;
}

// What bounds the sums of products with int8, of one row or of several: the sum of a row's sizes, and of each lane's squares.
struct Bounds {
  int64_t size = 0;
  std::vector<int32_t> squares;
  explicit Bounds(size_t lanes) : squares(lanes) {}
  void widen(const Bounds& other) {
    size = std::max(size, other.size);
    for (size_t i = 0; i < squares.size(); i++) squares[i] = std::max(squares[i], other.squares[i]);
  }
};

// One row as int8 into column `c` of its panel. Returns its bounds in `row`.
void pack_row_i8(const float* x, int k, uint8_t* panel, int c, float* scale, Bounds& row) {
  const float top = largest(x, k);
  const bool some = top > 1e-30f;
  const float inverse = some ? 127.0f / top : 0.0f;
  *scale = some ? top / 127.0f : 0.0f;
  row = Bounds(row.squares.size());
  for (int i = 0; i < k; i++) {
    const int q = nearest(x[i] * inverse);
    panel[size_t(i / 4) * 64 + c * 4 + i % 4] = uint8_t(q + 128);
    row.size += std::abs(q);
    row.squares[i / 16 * 2 + i % 4 / 2] += q * q;
  }
}

// The scale of a group of int4 that leaves the least squared error, among a few around the largest value.
float group_scale(const float* x, int n) {
  const float top = largest(x, n);
  if (!(top > 1e-30f)) return 0.0f;
  float best = 0, least = INFINITY;
  for (int step = 0; step < 9; step++) {
    const float scale = to_bf16(top / 7.0f * (1.06f - 0.04f * step));
    float error = 0;
    for (int i = 0; i < n; i++) {
      const float q = float(std::clamp(nearest(x[i] / scale), -8, 7));
      error += (x[i] - q * scale) * (x[i] - q * scale);
    }
    if (error < least) {
      least = error;
      best = scale;
    }
  }
  return best;
}

void pack_row_i4(const float* x, int k, uint8_t* panel, int c) {
  for (int first = 0; first < k; first += kGroup) {
    uint8_t* group = panel + size_t(first / kGroup) * kGroupBytes;
    const int n = std::min(kGroup, k - first);
    const float scale = group_scale(x + first, n);
    for (int i = 0; i < kGroup; i++) {
      const int q = i < n && scale > 0 ? std::clamp(nearest(x[first + i] / scale), -8, 7) : 0;
      uint8_t& byte = group[(i % 32) / 4 * 64 + c * 4 + i % 4];
      byte = i < 32 ? uint8_t(q + 8) : uint8_t(byte | (q + 8) << 4);
    }
    uint32_t bits;
    std::memcpy(&bits, &scale, 4);
    const uint16_t half = uint16_t(bits >> 16);
    std::memcpy(group + 512 + 2 * c, &half, 2);
  }
}

}  // namespace

void pack_matrix(const Entry& e, const float* weight, const float* bias, uint8_t* to, int threads) {
  const Matrix m = matrix_at(e, to);
  std::memset(to + e.offset, 0, e.bytes);
  uint8_t* data = to + e.offset;
  float* scale = const_cast<float*>(m.scale);
  std::atomic<int> next{0};
  const size_t lanes = m.kind == Kind::kI8 ? m.k_pad / kLaneInputs : 0;
  Bounds bounds(lanes);
  std::mutex mutex;
  auto work = [&] {
    Bounds seen(lanes), one(lanes);
    for (int p; (p = next.fetch_add(1)) < m.num_panels();) {
      uint8_t* panel = data + size_t(p) * m.panel_bytes;
      for (int c = 0; c < kLanes; c++) {
        const int row = p * kLanes + c;
        // Rows past the last: int4's zero is not a zero byte, so they are packed too.
        const float* x = row < m.n ? weight + size_t(row) * m.k : nullptr;
        if (m.kind == Kind::kF32) {
          if (x)
            for (int k = 0; k < m.k; k++) std::memcpy(panel + (size_t(k) * kLanes + c) * 4, x + k, 4);
        } else if (m.kind == Kind::kI8) {
          if (!x) continue;
          pack_row_i8(x, m.k, panel, c, scale + row, one);
          seen.widen(one);
        } else {
          const std::vector<float> zeros(x ? 0 : m.k);
          pack_row_i4(x ? x : zeros.data(), m.k, panel, c);
        }
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    bounds.widen(seen);
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; i++) pool.emplace_back(work);
  work();
  for (std::thread& thread : pool) thread.join();
  if (bias) std::memcpy(const_cast<float*>(m.bias), bias, sizeof(float) * m.n);
  // A sum of products is at most (the largest activation) x (sum of the weights' sizes): with this limit on
  // activations int32 holds it, for any input. It binds (under 15 bits) only where a row's weights are all large.
  // The 128 is what rounding to a shared exponent may add.
  const int32_t act_max = int32_t(std::clamp<int64_t>(INT32_MAX / std::max<int64_t>(bounds.size, 1) - 128, 1, kActMax));
  std::memcpy(const_cast<float*>(m.bias + m.n_pad), &act_max, 4);
  // The same for a lane's 16 bits (activations_avx2.h): by Cauchy and Schwarz the square of a sum of products is at most
  // the product of the sums of squares.
  int32_t* limits = const_cast<int32_t*>(m.lane_limits);
  for (size_t i = 0; i < lanes; i++) limits[i] = INT16_MAX * INT16_MAX / std::max(bounds.squares[i], 1);
}

void pack_vector(const Entry& e, const float* values, uint8_t* to) {
  const int width = round_up(e.k, kDepth);
  std::memset(to + e.offset, 0, e.bytes);
  for (int row = 0; row < e.n; row++)
    std::memcpy(to + e.offset + sizeof(float) * size_t(row) * width, values + size_t(row) * e.k, sizeof(float) * e.k);
}

}  // namespace nanogpt
