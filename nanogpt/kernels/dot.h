// Products of a few activation rows with a few panels: the only file that knows integer instructions.
//
// Weights, K and V are int8, kept as unsigned bytes w + 128 (int4: w + 8), because x86 multiplies unsigned with signed.
// The product then holds 128 times the activations' sum too much, which is one number a row: `offsets`, 128 * sum.
// Every sum is exact in 32 bits, modulo 2^32 on the way, so all instruction sets give the same number in any order.
//
// Two kinds of quantized activations:
//   shared exponents (a matrix's input)  q * 2^e: q is an int8, e in 0 .. 7 one exponent a group of 64 inputs
//   15 bits          (attention)         an integer a, |a| <= 16383
// A shared exponent costs one product and a shift a group where 15 bits cost two products. For machines whose unit wants
// it (AMX) or that multiply int16 anyway (AVX2) the shift is made beforehand: a = q << e. Same number, same bits.
#pragma once

#include "layout.h"
#include "simd.h"

namespace nanogpt {
namespace {

// ---- how activations lie in memory ------------------------------------------------------------------------------------

// A row of a matrix's input: 2 * k_pad bytes for the values, then this for every group of 64.
struct GroupInfo {
  int32_t exponent;
  int32_t sum;  // of q
};

#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool kBytes = true;  // byte products: q as int8; 15 bits as two planes of int8, a = 256 high + low
#else
constexpr bool kBytes = false;  // int16 products
#endif

// What to fetch into the L2 cache on the way: so many lines a group of 64 inputs. A panel is used for all rows before
// the next one is begun, and without this the first rows would wait for memory while it had nothing to do before.
struct Ahead {
  const uint8_t* next = nullptr;
  int lines = 0;
};

NG_INLINE void store_bytes(uint8_t* to, const I32& a) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)a.v[0]));
#else
  alignas(64) int32_t t[16];
  store(t, a);
  for (int j = 0; j < 16; j++) to[j] = uint8_t(t[j]);
#endif
}
NG_INLINE void store_shorts(uint8_t* to, const I32& a) {
  alignas(64) int32_t t[16];
  store(t, a);
  int16_t s[16];
  for (int j = 0; j < 16; j++) s[j] = int16_t(t[j]);
  std::memcpy(to, s, 32);
}
// Sixteen 15-bit values to elements i .. i + 16.
NG_INLINE void put_planes(uint8_t* row, int plane, int i, const I32& a) {
  store_bytes(row + i, shift_right_signed(a + splat(int32_t(128)), 8));
  store_bytes(row + plane + i, a);
}
NG_INLINE void put(uint8_t* row, int plane, int i, const I32& a) {
  if (kBytes)
    put_planes(row, plane, i, a);
  else
    store_shorts(row + 2 * i, a);
}

// ---- AVX-512 VNNI -----------------------------------------------------------------------------------------------------

#if defined(__AVX512VNNI__)
constexpr int kMaxRows = 6;
constexpr int kPanelsAtOnce = 4;  // for up to three rows, and two for more: as many sums as there are registers

// acc += four products u8 x s8 a lane. As an instruction and not as its intrinsic, for which GCC 12 copies every
// accumulator twice.
NG_INLINE void multiply_add(__m512i& acc, const __m512i& w, const __m512i& a) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a));
}
NG_INLINE __m512i broadcast4(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

template <int R, int P>
inline void dot_shared(const uint8_t* a, size_t a_stride, const GroupInfo* info, const uint8_t* w, size_t w_stride,
                       int groups, const int32_t* offsets, int32_t* out, int ldo, Ahead ahead) {
  __m512i total[R][P];
  each<R>(NG_BODY(r) {
    each<P>(NG_BODY(p) { total[r][p] = _mm512_set1_epi32(-offsets[r]); });
  });
  for (int g = 0; g < groups; g++, info++) {
    __m512i s[R][P];
    each<R>(NG_BODY(r) { each<P>(NG_BODY(p) { s[r][p] = _mm512_setzero_si512(); }); });
    for (int k = 0; k < 16; k++, a += 4, w += 64) {
      __m512i b[P];
      each<P>(NG_BODY(p) { b[p] = _mm512_loadu_si512(w + p * w_stride); });
      each<R>(NG_BODY(r) {
        const __m512i x = broadcast4(a + r * a_stride);
        each<P>(NG_BODY(p) { multiply_add(s[r][p], b[p], x); });
      });
    }
    each<R>(NG_BODY(r) {
      const __m512i e = broadcast4((const uint8_t*)info + r * a_stride);
      each<P>(NG_BODY(p) { total[r][p] = _mm512_add_epi32(total[r][p], _mm512_sllv_epi32(s[r][p], e)); });
    });
    for (int i = 0; i < ahead.lines; i++, ahead.next += 64) prefetch(ahead.next);
  }
  each<R>(NG_BODY(r) { each<P>(NG_BODY(p) { _mm512_storeu_si512(out + r * ldo + kLanes * p, total[r][p]); }); });
}

template <int R, int P>
inline void dot_15(const uint8_t* a, size_t a_stride, int plane, const uint8_t* w, size_t w_stride, int kq,
                   const int32_t* offsets, int32_t* out, int ldo, bool add) {
  __m512i hi[R][P], lo[R][P];
  each<R>(NG_BODY(r) { each<P>(NG_BODY(p) { hi[r][p] = lo[r][p] = _mm512_setzero_si512(); }); });
  for (int k = 0; k < kq; k++, a += 4, w += 64) {
    __m512i b[P];
    each<P>(NG_BODY(p) { b[p] = _mm512_loadu_si512(w + p * w_stride); });
    each<R>(NG_BODY(r) {
      const __m512i vh = broadcast4(a + r * a_stride), vl = broadcast4(a + r * a_stride + plane);
      each<P>(NG_BODY(p) {
        multiply_add(hi[r][p], b[p], vh);
        multiply_add(lo[r][p], b[p], vl);
      });
    });
  }
  each<R>(NG_BODY(r) {
    each<P>(NG_BODY(p) {
      int32_t* o = out + r * ldo + kLanes * p;
      const __m512i from = add ? _mm512_loadu_si512(o) : _mm512_set1_epi32(-offsets[r]);
      _mm512_storeu_si512(o, _mm512_add_epi32(from, _mm512_add_epi32(_mm512_slli_epi32(hi[r][p], 8), lo[r][p])));
    });
  });
}

// ---- NEON dot product -------------------------------------------------------------------------------------------------

#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int kMaxRows = 3;
constexpr int kPanelsAtOnce = 1;

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
                   int32_t* out, int ldo, bool add) {
  static_assert(P == 1, "one panel fills the registers");
  int32x4_t hi[R][4], lo[R][4];
  each<R>(NG_BODY(r) { each<4>(NG_BODY(c) { hi[r][c] = lo[r][c] = vdupq_n_s32(0); }); });
  for (int k = 0; k < kq; k++, a += 4, w += 64) {
    int8x16_t b[4];
    load_weights(w, b);
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

// ---- int16 products: AVX2, and plain C++ ------------------------------------------------------------------------------

#else
constexpr int kMaxRows = 3;
constexpr int kPanelsAtOnce = 1;

template <int R, int P>
inline void dot_15(const uint8_t* a, size_t a_stride, int, const uint8_t* w, size_t, int kq, const int32_t* offsets,
                   int32_t* out, int ldo, bool add) {
  static_assert(P == 1, "one panel fills the registers");
#if defined(__AVX2__)
  __m256i acc[R][4];  // four columns each, two partial sums a column
  each<R>(NG_BODY(r) { each<4>(NG_BODY(c) { acc[r][c] = _mm256_setzero_si256(); }); });
  for (int k = 0; k < kq; k++, a += 8, w += 64) {
    __m256i va[R];
    each<R>(NG_BODY(r) {
      int64_t four;
      std::memcpy(&four, a + r * a_stride, 8);
      va[r] = _mm256_set1_epi64x(four);
    });
    each<4>(NG_BODY(c) {
      const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(w + 16 * c)));
      each<R>(NG_BODY(r) { acc[r][c] = _mm256_add_epi32(acc[r][c], _mm256_madd_epi16(va[r], b)); });
    });
  }
  each<R>(NG_BODY(r) {
    each<2>(NG_BODY(half) {
      // hadd works in halves: columns 0 1 4 5 | 2 3 6 7 of the eight; the permutation puts them in order.
      const __m256i pairs = _mm256_hadd_epi32(acc[r][2 * half], acc[r][2 * half + 1]);
      const __m256i s = _mm256_permute4x64_epi64(pairs, _MM_SHUFFLE(3, 1, 2, 0));
      __m256i* o = (__m256i*)(out + r * ldo + 8 * half);
      _mm256_storeu_si256(o, _mm256_add_epi32(s, add ? _mm256_loadu_si256(o) : _mm256_set1_epi32(-offsets[r])));
    });
  });
#else
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
#endif
}

template <int R, int P>
inline void dot_shared(const uint8_t* a, size_t a_stride, const GroupInfo*, const uint8_t* w, size_t w_stride,
                       int groups, const int32_t* offsets, int32_t* out, int ldo, Ahead) {
  dot_15<R, P>(a, a_stride, 0, w, w_stride, groups * kGroup / 4, offsets, out, ldo, false);
}
#endif

// ---- int4 -------------------------------------------------------------------------------------------------------------

// Groups of 64 inputs with their own scale. Inside a group sums are exact; over groups floats are added in the order of
// the inputs. A group of a panel: 512 bytes (byte j of 64 * i: column j / 4, inputs 4 i + j % 4 in the low half of the
// byte and 32 + 4 i + j % 4 in the high one, both + 8), then 16 bf16 scales.
template <int R>
inline void dot_i4(const uint8_t* a, size_t a_stride, const GroupInfo* info, const uint8_t* w, int groups, float* out,
                   int ldo) {
  F32 total[R];
  each<R>(NG_BODY(r) { total[r] = splat(0.0f); });
  for (int g = 0; g < groups; g++, w += kGroupBytes, info++) {
    alignas(64) int32_t s[R * 16];
    alignas(64) uint32_t scale[16];
    uint16_t small_scale[16];
    std::memcpy(small_scale, w + 512, 32);
    for (int c = 0; c < 16; c++) scale[c] = uint32_t(small_scale[c]) << 16;
    int32_t offsets[R];  // in the unit of the values: 8 times their sum
    int32_t exponents[R];
    each<R>(NG_BODY(r) {
      GroupInfo one;
      std::memcpy(&one, (const uint8_t*)info + r * a_stride, sizeof one);
      exponents[r] = one.exponent;
      offsets[r] = one.sum * 8;
    });
#if defined(__AVX512VNNI__)
    __m512i acc[R];
    each<R>(NG_BODY(r) { acc[r] = _mm512_set1_epi32(-offsets[r]); });
    const __m512i mask = _mm512_set1_epi8(15);
    each<8>(NG_BODY(i) {
      const __m512i both = _mm512_loadu_si512(w + 64 * i);
      const __m512i b0 = _mm512_and_si512(both, mask), b1 = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
      each<R>(NG_BODY(r) {
        const uint8_t* row = a + r * a_stride + size_t(kGroup) * g + 4 * i;
        multiply_add(acc[r], b0, broadcast4(row));
        multiply_add(acc[r], b1, broadcast4(row + 32));
      });
    });
    each<R>(NG_BODY(r) { _mm512_store_si512(s + 16 * r, _mm512_slli_epi32(acc[r], exponents[r])); });
#else
    uint8_t wide[1024];
    for (int i = 0; i < 512; i++) {
      wide[i] = w[i] & 15;
      wide[512 + i] = w[i] >> 4;
    }
    each<R>(NG_BODY(r) { offsets[r] = offsets[r] << exponents[r]; });
#if defined(__ARM_FEATURE_DOTPROD)
    for (uint8_t& byte : wide) byte = uint8_t(byte + 120);  // signed there: w + 8 - 8, with the top bit turned
#endif
    dot_shared<R, 1>(a + size_t(kBytes ? kGroup : 2 * kGroup) * g, a_stride, info, wide, 0, 1, offsets, s, 16, {});
#endif
    F32 by;
    std::memcpy(&by, scale, 64);
    each<R>(NG_BODY(r) { total[r] = fma(to_float(load(s + 16 * r)), by, total[r]); });
  }
  each<R>(NG_BODY(r) { store(out + r * ldo, total[r]); });
}

// ---- float32 ----------------------------------------------------------------------------------------------------------

// Every column's sum runs over the inputs in order, whatever R and P are.
template <int R, int P>
inline void dot_f32(const float* a, size_t a_stride, const float* w, size_t w_stride, int k_len, float* out, int ldo,
                    bool add) {
  F32 acc[R][P];
  each<R>(NG_BODY(r) {
    each<P>(NG_BODY(p) { acc[r][p] = add ? load(out + r * ldo + kLanes * p) : splat(0.0f); });
  });
  for (int k = 0; k < k_len; k++, w += kLanes) {
    each<P>(NG_BODY(p) {
      const F32 b = load(w + p * w_stride);
      each<R>(NG_BODY(r) { acc[r][p] = fma(splat(a[r * a_stride + k]), b, acc[r][p]); });
    });
  }
  each<R>(NG_BODY(r) { each<P>(NG_BODY(p) { store(out + r * ldo + kLanes * p, acc[r][p]); }); });
}

}  // namespace
}  // namespace nanogpt
