// Products in plain C++ (dot.h).
#pragma once

#include "activations.h"

namespace nanogpt {
namespace {

constexpr int kMaxRows = 3;
constexpr ActFormat kInt8Input = ActFormat::kShorts, kInt4Input = ActFormat::kBytes;
using Row = PlainRow;
constexpr size_t kRowGroupBytes = 2 * kGroup + sizeof(GroupInfo);
constexpr int kPanelsAtOnce = 1;
constexpr int kFetchFrom = 1;

template <int R, int P>
inline void dot_15(const uint8_t* a, size_t a_stride, int, const uint8_t* w, size_t, int kq, const int32_t* offsets,
                   int32_t* out, int ldo, bool add, size_t) {
  static_assert(P == 1, "one panel at a time");
  for (int r = 0; r < R; r++) {
    uint32_t acc[16] = {};
    for (int k = 0; k < kq; k++) {
      int16_t four[4];
      std::memcpy(four, a + r * a_stride + 8 * k, 8);
      const uint8_t* b = w + size_t(64) * k;
      for (int c = 0; c < 16; c++)
        for (int j = 0; j < 4; j++) acc[c] += uint32_t(four[j] * b[4 * c + j]);
    }
    int32_t* o = out + r * ldo;
    for (int c = 0; c < 16; c++) o[c] = int32_t(acc[c] + (add ? uint32_t(o[c]) : -uint32_t(offsets[r])));
  }
}

template <int R, int P>
inline void dot_shared(const uint8_t* a, size_t a_stride, const GroupInfo*, const uint8_t* w, size_t w_stride,
                       int groups, const int32_t* offsets, int32_t* out, int ldo, Ahead) {
  dot_15<R, P>(a, a_stride, 0, w, w_stride, groups * kGroup / 4, offsets, out, ldo, false, 0);
}

template <int R>
NG_INLINE void dot_group(const uint8_t* a, size_t a_stride, int groups, int g, const uint8_t* w, I32 (&sums)[R]) {
  for (int r = 0; r < R; r++) {
    alignas(64) int32_t acc[16];
    const uint8_t* row = a + r * a_stride;
    const GroupInfo info = group_info(row, groups, g);
    for (int c = 0; c < 16; c++) acc[c] = info.start;
    for (int i = 0; i < 512; i++) {
      const int8_t* x = reinterpret_cast<const int8_t*>(row + g * kGroup) + i / 64 * 4 + i % 4;
      acc[i % 64 / 4] += (w[i] & 15) * x[0] + (w[i] >> 4) * x[32];
    }
    sums[r] = shift_left(load(acc), info.exponent);
  }
}

}  // namespace
}  // namespace nanogpt
