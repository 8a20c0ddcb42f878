// Products on NEON's dot product instructions (dot.h).
#pragma once

#include "activations.h"

namespace nanogpt {
namespace {

constexpr int kMaxRows = 3;
constexpr ActFormat kInt8Input = ActFormat::kBytes, kInt4Input = ActFormat::kBytes;
using Row = PlainRow;
constexpr size_t kRowGroupBytes = 2 * kGroup + sizeof(GroupInfo);
constexpr int kPanelsAtOnce = 1;
constexpr int kFetchFrom = 1;

// Signed products alone are in every such machine: w + 128 as a byte, with its top bit turned, is w as int8. So there
// is nothing to take off, and the offsets that callers pass (for x86) are ignored.
NG_INLINE void load_weights(const uint8_t* w, int8x16_t (&b)[4]) {
  each<4>(NG_BODY(c) { b[c] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + 16 * c), vdupq_n_u8(128))); });
}
NG_INLINE int8x16_t broadcast4(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

template <int R, int P>
inline void dot_shared(const uint8_t* a, size_t a_stride, const GroupInfo* info, const uint8_t* w, size_t,
                       int groups, const int32_t*, int32_t* out, int ldo, Ahead) {
  static_assert(P == 1, "one panel fills the registers");
  int32x4_t total[R][4];
  each<R>(NG_BODY(r) { each<4>(NG_BODY(c) { total[r][c] = vdupq_n_s32(0); }); });
  for (int g = 0; g < groups; g++, info++) {
    int32x4_t s[R][4];
    each<R>(NG_BODY(r) { each<4>(NG_BODY(c) { s[r][c] = vdupq_n_s32(0); }); });
    for (int k = 0; k < 16; k++, a += 4, w += 64) {
      int8x16_t b[4];
      load_weights(w, b);
      each<R>(NG_BODY(r) {
        const int8x16_t x = broadcast4(a + r * a_stride);
        each<4>(NG_BODY(c) { s[r][c] = vdotq_s32(s[r][c], b[c], x); });
      });
    }
    each<R>(NG_BODY(r) {
      int32_t e;
      std::memcpy(&e, (const uint8_t*)info + r * a_stride, 4);
      each<4>(NG_BODY(c) { total[r][c] = vaddq_s32(total[r][c], vshlq_s32(s[r][c], vdupq_n_s32(e))); });
    });
  }
  each<R>(NG_BODY(r) { each<4>(NG_BODY(c) { vst1q_s32(out + r * ldo + 4 * c, total[r][c]); }); });
}

template <int R, int P>
inline void dot_15(const uint8_t* a, size_t a_stride, int plane, const uint8_t* w, size_t, int kq, const int32_t*,
                   int32_t* out, int ldo, bool add, size_t ahead) {
  static_assert(P == 1, "one panel fills the registers");
  int32x4_t hi[R][4], lo[R][4];
  each<R>(NG_BODY(r) { each<4>(NG_BODY(c) { hi[r][c] = lo[r][c] = vdupq_n_s32(0); }); });
  for (int k = 0; k < kq; k++, a += 4, w += 64) {
    int8x16_t b[4];
    load_weights(w, b);
    if constexpr (R <= kFewRows) prefetch(w + ahead);
    each<R>(NG_BODY(r) {
      const int8x16_t vh = broadcast4(a + r * a_stride), vl = broadcast4(a + r * a_stride + plane);
      each<4>(NG_BODY(c) {
        hi[r][c] = vdotq_s32(hi[r][c], b[c], vh);
        lo[r][c] = vdotq_s32(lo[r][c], b[c], vl);
      });
    });
  }
  each<R>(NG_BODY(r) {
    each<4>(NG_BODY(c) {
      int32_t* o = out + r * ldo + 4 * c;
      const int32x4_t s = vaddq_s32(vshlq_n_s32(hi[r][c], 8), lo[r][c]);
      vst1q_s32(o, add ? vaddq_s32(s, vld1q_s32(o)) : s);
    });
  });
}

template <int R>
NG_INLINE void dot_group(const uint8_t* a, size_t a_stride, int groups, int g, const uint8_t* w, I32 (&sums)[R]) {
  int32x4_t acc[R][4];
  int32_t exponents[R];
  each<R>(NG_BODY(r) {
    exponents[r] = group_info(a + r * a_stride, groups, g).exponent;
    each<4>(NG_BODY(c) { acc[r][c] = vdupq_n_s32(0); });
  });
  a += g * kGroup;
  for (int i = 0; i < 8; i++, a += 4, w += 64) {
    int8x16_t b0[4], b1[4];  // signed: w + 8 - 8
    each<4>(NG_BODY(c) {
      const uint8x16_t both = vld1q_u8(w + 16 * c);
      b0[c] = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15))), vdupq_n_s8(8));
      b1[c] = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(both, 4)), vdupq_n_s8(8));
    });
    each<R>(NG_BODY(r) {
      const int8x16_t x0 = broadcast4(a + r * a_stride), x1 = broadcast4(a + r * a_stride + 32);
      each<4>(NG_BODY(c) { acc[r][c] = vdotq_s32(vdotq_s32(acc[r][c], b0[c], x0), b1[c], x1); });
    });
  }
  each<R>(NG_BODY(r) {
    each<4>(NG_BODY(c) { sums[r].v[c] = (NativeU)vreinterpretq_u32_s32(acc[r][c]) << exponents[r]; });
  });
}

}  // namespace
}  // namespace nanogpt
