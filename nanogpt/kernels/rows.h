// What is done to one row: quantizing it, and layer normalization.
#pragma once

#include "dot.h"

namespace nanogpt {
namespace {

NG_INLINE int imin(int a, int b) { return a < b ? a : b; }
NG_INLINE int imax(int a, int b) { return a > b ? a : b; }

NG_INLINE float largest_size(const float* x, int n) {
  F32 largest[4];  // one alone would wait for itself at each turn
  each<4>(NG_BODY(j) { largest[j] = splat(0.0f); });
  int i = 0;
  for (; i + 64 <= n; i += 64)
    each<4>(NG_BODY(j) { largest[j] = max(abs(load(x + i + 16 * j)), largest[j]); });
  for (; i < n; i += 16) largest[0] = max(abs(load(x + i)), largest[0]);
  return max_lane(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
}
constexpr float kTiny = 1e-30f;  // below, 1 / x would overflow: such a row is taken for zero

// The floats x[0, n) as 15-bit integers, zeros up to n_pad. Returns their unit; `offset` see dot.h.
inline float quantize_15(const float* x, int n, int n_pad, int limit, const Row15& out, int32_t* offset) {
  const float top = largest_size(x, n);
  const F32 inverse = splat(top > kTiny ? float(limit) / top : 0.0f);
  I32 total = splat(int32_t(0));
  int i = 0;
  for (; i < n; i += 16) {
    const I32 a = round_to_int(load(x + i) * inverse);
    total = total + a;
    put(out, i, a);
  }
  for (; i < n_pad; i += 16) put(out, i, splat(int32_t(0)));
  *offset = int32_t(uint32_t(sum(total)) * 128u);
  return top > kTiny ? top / float(limit) : 0.0f;
}

// The same for the input of a matrix: in every group of 64 the integers are rounded to -93 .. 93 and a common exponent.
inline float quantize_shared(const float* x, const Matrix& m, ActFormat format, uint8_t* out, int32_t* offset) {
  const int limit = imin(m.act_max, kMostQ << 7);  // so the largest of a row, which matters most, is rounded to itself
  const float top = largest_size(x, m.k);
  const float inverse = top > kTiny ? float(limit) / top : 0.0f;
  Row row(out, m, format);
  for (int g = 0; g < m.k_pad / kGroup; g++) {
    F32 size = splat(0.0f);
    each<4>(NG_BODY(j) {
      const int i = g * kGroup + j * 16;
      if (i < m.k) size = max(abs(load(x + i)), size);
    });
    const int32_t s = round_to_int(max_lane(size) * inverse);
    const uint32_t bits_used = 32 - uint32_t(__builtin_clz(uint32_t(s + (s >> 2) + (s >> 3)) | 1));  // 11/8: 93 is 127
    const int e = bits_used > 7 ? int(bits_used) - 7 : 0;
    const I32 half = splat(int32_t(1 << e >> 1));
    I32 a[4];
    each<4>(NG_BODY(j) {
      const int i = g * kGroup + j * 16;
      a[j] = i < m.k ? shift_right_signed(round_to_int(load(x + i) * splat(inverse)) + half, e) : splat(int32_t(0));
    });
    row.group(g, e, a);
  }
  *offset = int32_t(row.finish() * 128u);
  return top > kTiny ? top / float(limit) : 0.0f;
}

// x must be zero past n, up to a multiple of 16.
inline void layer_norm(const float* x, int n, const float* w, const float* b, float eps, float* out) {
  F32 total = splat(0.0f);
  for (int i = 0; i < n; i += 16) total = total + load(x + i);
  const F32 mean = splat(sum(total) / float(n));
  F32 squares = splat(0.0f);
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const F32 d = load(x + i) - mean;
    squares = fma(d, d, squares);
  }
  if (i < n) {
    const F32 d = select(less(iota(), splat(int32_t(n - i))), load(x + i) - mean, splat(0.0f));
    squares = fma(d, d, squares);
  }
  const F32 inverse = splat(1.0f / __builtin_sqrtf(sum(squares) / float(n) + eps));
  for (i = 0; i < n; i += 16) store(out + i, fma((load(x + i) - mean) * inverse, load(w + i), load(b + i)));
}

}  // namespace
}  // namespace nanogpt
