// Products of a few activation rows with a few panels: the only file that knows integer instructions.
//
// A quantized activation is an integer of 15 bits and sign. `put` stores sixteen of them in the form that the
// instruction set multiplies best, in 2 bytes each:
//   VNNI, AMX  two planes of unsigned bytes of a + 32768 (high and low): u8 x s8 products, 128 * 256 taken off by `sums`
//   NEON       two planes of signed bytes, a = 256 high + low
//   others     int16
// The sum over inputs is exact in int32 (pack.cc bounds it), so all of these give the same number, in any order.
#pragma once

#include "layout.h"
#include "simd.h"

namespace nanogpt {
namespace {

// Sixteen activations to elements i .. i + 16 of a row. Unsigned rows hold values >= 0 and need no `sums`.
#if defined(__AVX512VNNI__)
constexpr bool kPlanes = true;
constexpr int kMaxRows = 6;
constexpr int kPanelsAtOnce = 4;
template <bool kSigned>
NG_INLINE void put(uint8_t* row, int plane, int i, const I32& a) {
  __m512i v = (__m512i)a.v[0];
  if (kSigned) v = _mm512_add_epi32(v, _mm512_set1_epi32(32768));
  _mm_storeu_si128((__m128i*)(row + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(v, 8)));
  _mm_storeu_si128((__m128i*)(row + plane + i), _mm512_cvtepi32_epi8(v));
}

template <int R, int P>
inline void dot_i8(const uint8_t* a, size_t a_stride, int plane, const uint8_t* w, size_t w_stride, int kq,
                   const int32_t* sums, int32_t* out, int ldo, bool add) {
  __m512i hi[R][P], lo[R][P];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) hi[r][p] = lo[r][p] = _mm512_setzero_si512();
  for (int k = 0; k < kq; k++) {
    __m512i b[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      b[p] = _mm512_loadu_si512(w + p * w_stride + size_t(64) * k);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      int32_t ah, al;
      std::memcpy(&ah, a + r * a_stride + 4 * k, 4);
      std::memcpy(&al, a + r * a_stride + plane + 4 * k, 4);
      const __m512i vh = _mm512_set1_epi32(ah), vl = _mm512_set1_epi32(al);
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) {
        hi[r][p] = _mm512_dpbusd_epi32(hi[r][p], vh, b[p]);
        lo[r][p] = _mm512_dpbusd_epi32(lo[r][p], vl, b[p]);
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; p++) {
    const __m512i offset =
        sums ? _mm512_slli_epi32(_mm512_loadu_si512(sums + kLanes * p), 15) : _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      __m512i s = _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(hi[r][p], 8), lo[r][p]), offset);
      int32_t* o = out + r * ldo + kLanes * p;
      if (add) s = _mm512_add_epi32(s, _mm512_loadu_si512(o));
      _mm512_storeu_si512(o, s);
    }
  }
}

#elif defined(__ARM_FEATURE_DOTPROD)
constexpr bool kPlanes = true;
constexpr int kMaxRows = 3;
constexpr int kPanelsAtOnce = 1;
template <bool kSigned>
NG_INLINE void put(uint8_t* row, int plane, int i, const I32& a) {
  alignas(64) int32_t t[16];
  store(t, a);
  for (int j = 0; j < 16; j++) {
    const int32_t high = (t[j] + 128) >> 8;
    row[i + j] = uint8_t(high);
    row[plane + i + j] = uint8_t(t[j] - 256 * high);
  }
}

template <int R, int P>
inline void dot_i8(const uint8_t* a, size_t a_stride, int plane, const uint8_t* w, size_t w_stride, int kq,
                   const int32_t* sums, int32_t* out, int ldo, bool add) {
  static_assert(P == 1, "one panel fills the registers");
  (void)w_stride, (void)sums;
  int32x4_t hi[R][4], lo[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) hi[r][c] = lo[r][c] = vdupq_n_s32(0);
  for (int k = 0; k < kq; k++) {
    int8x16_t b[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) b[c] = vld1q_s8((const int8_t*)w + size_t(64) * k + 16 * c);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const int8x16_t vh = vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t*)(a + r * a_stride + 4 * k)));
      const int8x16_t vl = vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t*)(a + r * a_stride + plane + 4 * k)));
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) {
        hi[r][c] = vdotq_s32(hi[r][c], b[c], vh);
        lo[r][c] = vdotq_s32(lo[r][c], b[c], vl);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
      int32x4_t s = vaddq_s32(vshlq_n_s32(hi[r][c], 8), lo[r][c]);
      int32_t* o = out + r * ldo + 4 * c;
      if (add) s = vaddq_s32(s, vld1q_s32(o));
      vst1q_s32(o, s);
    }
}

#else
constexpr bool kPlanes = false;
constexpr int kMaxRows = 3;
constexpr int kPanelsAtOnce = 1;
template <bool kSigned>
NG_INLINE void put(uint8_t* row, int plane, int i, const I32& a) {
  (void)plane;
  alignas(64) int32_t t[16];
  store(t, a);
  int16_t s[16];
  for (int j = 0; j < 16; j++) s[j] = int16_t(t[j]);
  std::memcpy(row + 2 * i, s, 32);
}

#if defined(__AVX2__)
template <int R, int P>
inline void dot_i8(const uint8_t* a, size_t a_stride, int plane, const uint8_t* w, size_t w_stride, int kq,
                   const int32_t* sums, int32_t* out, int ldo, bool add) {
  static_assert(P == 1, "one panel fills the registers");
  (void)plane, (void)w_stride, (void)sums;
  __m256i acc[R][4];  // four columns each, two partial sums a column
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) acc[r][c] = _mm256_setzero_si256();
  for (int k = 0; k < kq; k++) {
    __m256i va[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      int64_t four;
      std::memcpy(&four, a + r * a_stride + 8 * k, 8);
      va[r] = _mm256_set1_epi64x(four);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
      const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + size_t(64) * k + 16 * c)));
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) acc[r][c] = _mm256_add_epi32(acc[r][c], _mm256_madd_epi16(va[r], b));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int c = 0; c < 4; c += 2) {
      // hadd works in halves: columns 0 1 4 5 | 2 3 6 7 of the eight; the permutation puts them in order.
      const __m256i pairs = _mm256_hadd_epi32(acc[r][c], acc[r][c + 1]);
      __m256i s = _mm256_permute4x64_epi64(pairs, _MM_SHUFFLE(3, 1, 2, 0));
      __m256i* o = (__m256i*)(out + r * ldo + 4 * c);
      if (add) s = _mm256_add_epi32(s, _mm256_loadu_si256(o));
      _mm256_storeu_si256(o, s);
    }
}
#else
template <int R, int P>
inline void dot_i8(const uint8_t* a, size_t a_stride, int plane, const uint8_t* w, size_t w_stride, int kq,
                   const int32_t* sums, int32_t* out, int ldo, bool add) {
  static_assert(P == 1, "one panel at a time");
  (void)plane, (void)w_stride, (void)sums;
  for (int r = 0; r < R; r++) {
    uint32_t acc[16] = {};
    for (int k = 0; k < kq; k++) {
      int16_t four[4];
      std::memcpy(four, a + r * a_stride + 8 * k, 8);
      const int8_t* b = (const int8_t*)w + size_t(64) * k;
      for (int c = 0; c < 16; c++)
        acc[c] += uint32_t(four[0] * b[4 * c] + four[1] * b[4 * c + 1] + four[2] * b[4 * c + 2] +
                           four[3] * b[4 * c + 3]);
    }
    int32_t* o = out + r * ldo;
    for (int c = 0; c < 16; c++) o[c] = int32_t(add ? acc[c] + uint32_t(o[c]) : acc[c]);
  }
}
#endif
#endif

// int4: groups of 64 inputs with their own scale. Inside a group sums are exact; over groups floats are added in the
// order of the inputs. A group of a panel: 512 bytes (byte j of 64 * i: column j / 4, inputs 4 i + j % 4 in the low and
// 32 + 4 i + j % 4 in the high half, both + 8), 16 bf16 scales, 16 int16 sums of the columns.
template <int R>
inline void dot_i4(const uint8_t* a, size_t a_stride, int plane, const uint8_t* w, int groups, float* out, int ldo) {
  F32 total[R];
  for (int r = 0; r < R; r++) total[r] = splat(0.0f);
  for (int g = 0; g < groups; g++, w += kGroupBytes) {
    alignas(64) int32_t s[R * 16], sums[16];
    alignas(64) float scale[16];
    int16_t small_sums[16];
    uint16_t small_scale[16];
    std::memcpy(small_scale, w + 512, 32);
    std::memcpy(small_sums, w + 544, 32);
    for (int c = 0; c < 16; c++) sums[c] = small_sums[c];
    for (int c = 0; c < 16; c++) {
      const uint32_t wide = uint32_t(small_scale[c]) << 16;
      std::memcpy(&scale[c], &wide, 4);
    }
#if defined(__AVX512VNNI__)
    __m512i hi[R], lo[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) hi[r] = lo[r] = _mm512_setzero_si512();
    const __m512i mask = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      const __m512i both = _mm512_loadu_si512(w + 64 * i);
      const __m512i b0 = _mm512_sub_epi8(_mm512_and_si512(both, mask), eight);
      const __m512i b1 = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), mask), eight);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const uint8_t* row = a + r * a_stride + size_t(kGroup) * g + 4 * i;
        int32_t h0, h1, l0, l1;
        std::memcpy(&h0, row, 4);
        std::memcpy(&h1, row + 32, 4);
        std::memcpy(&l0, row + plane, 4);
        std::memcpy(&l1, row + plane + 32, 4);
        hi[r] = _mm512_dpbusd_epi32(hi[r], _mm512_set1_epi32(h0), b0);
        lo[r] = _mm512_dpbusd_epi32(lo[r], _mm512_set1_epi32(l0), b0);
        hi[r] = _mm512_dpbusd_epi32(hi[r], _mm512_set1_epi32(h1), b1);
        lo[r] = _mm512_dpbusd_epi32(lo[r], _mm512_set1_epi32(l1), b1);
      }
    }
    const __m512i offset = _mm512_slli_epi32(_mm512_load_si512(sums), 15);
    for (int r = 0; r < R; r++)
      _mm512_store_si512(s + 16 * r,
                         _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(hi[r], 8), lo[r]), offset));
#else
    uint8_t wide[1024];
    for (int i = 0; i < 512; i++) {
      wide[i] = uint8_t((w[i] & 15) - 8);
      wide[512 + i] = uint8_t((w[i] >> 4) - 8);
    }
    dot_i8<R, 1>(a + size_t(kPlanes ? kGroup : 2 * kGroup) * g, a_stride, plane, wide, 0, kGroup / 4, sums, s, 16,
                 false);
#endif
    for (int r = 0; r < R; r++) total[r] = fma(to_float(load(s + 16 * r)), load(scale), total[r]);
  }
  for (int r = 0; r < R; r++) store(out + r * ldo, total[r]);
}

// float32: every column's sum runs over the inputs in order, whatever R and P are.
template <int R, int P>
inline void dot_f32(const float* a, size_t a_stride, const float* w, size_t w_stride, int k_len, float* out, int ldo,
                    bool add) {
  F32 acc[R][P];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) acc[r][p] = add ? load(out + r * ldo + kLanes * p) : splat(0.0f);
  for (int k = 0; k < k_len; k++) {
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      const F32 b = load(w + p * w_stride + size_t(kLanes) * k);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[r][p] = fma(splat(a[r * a_stride + k]), b, acc[r][p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) store(out + r * ldo + kLanes * p, acc[r][p]);
}

}  // namespace
}  // namespace nanogpt
