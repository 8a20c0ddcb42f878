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
// Products with int4 take q as bytes everywhere.
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
#elif defined(__AVX2__)
  // The low bytes alone, as the other instruction sets take them: packing would saturate.
  const __m256i pick = _mm256_set1_epi64x(0x0c080400), low = _mm256_permutevar8x32_epi32(
      _mm256_unpacklo_epi32(_mm256_shuffle_epi8((__m256i)a.v[0], pick), _mm256_shuffle_epi8((__m256i)a.v[1], pick)),
      _mm256_setr_epi32(0, 4, 1, 5, 2, 3, 6, 7));
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(low));
#else
  alignas(64) int32_t t[16];
  store(t, a);
  for (int j = 0; j < 16; j++) to[j] = uint8_t(t[j]);
#endif
}
NG_INLINE void store_shorts(uint8_t* to, const I32& a) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i halves = _mm256_packs_epi32((__m256i)a.v[0], (__m256i)a.v[1]);
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(halves, _MM_SHUFFLE(3, 1, 2, 0)));
#else
  alignas(64) int32_t t[16];
  store(t, a);
  int16_t s[16];
  for (int j = 0; j < 16; j++) s[j] = int16_t(t[j]);
  std::memcpy(to, s, 32);
#endif
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
constexpr int kFetchFrom = 4;     // rows: for fewer the processor's own prefetcher is as good, and instructions are felt

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

// ---- AVX2: int16 products ---------------------------------------------------------------------------------------------

#elif defined(__AVX2__)
constexpr int kMaxRows = 6;
constexpr int kPanelsAtOnce = 1;
constexpr int kFetchFrom = 1;

// acc += products of int16, two a lane / of u8 x s8 into int16, two a lane. As instructions: from intrinsics GCC 12 makes
// sums of products first, which takes more registers than there are.
NG_INLINE void multiply_add(__m256i& acc, const __m256i& w, const __m256i& a) {
  __m256i product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(w), "x"(a));
}
NG_INLINE void multiply_add_bytes(__m256i& acc, const __m256i& w, const __m256i& a) {
  __m256i product;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(w), "x"(a));
}
NG_INLINE __m256i broadcast4(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// For one or two rows a panel's 16 columns at once, for more 8 and then 8: so all sums stay in registers. A column has two
// in an accumulator, of inputs 0 + 1 and 2 + 3 of four. U such steps are written out, for what a turn itself costs is
// felt; on the way F lines at `next` are fetched a turn, `stride` bytes from one to the next.
template <int R, int U, int F>
NG_INLINE void dot_16(const uint8_t* a, size_t a_stride, const uint8_t* w, int kq, const int32_t* offsets, int32_t* out,
                      int ldo, bool add, const uint8_t* next, size_t stride) {
  constexpr int C = R <= 2 ? 4 : 2;
  for (int first = 0; first < 16; first += 4 * C) {
    __m256i acc[R][C];
    each<R>(NG_BODY(r) { each<C>(NG_BODY(c) { acc[r][c] = _mm256_setzero_si256(); }); });
    const uint8_t *x = a, *b = w + 4 * first;
    const auto step = NG_BODY(i) {
      __m256i weights[C];
      each<C>(NG_BODY(c) { weights[c] = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(b + 64 * i + 16 * c))); });
      each<R>(NG_BODY(r) {
        int64_t four;
        std::memcpy(&four, x + r * a_stride + 8 * i, 8);
        const __m256i activations = _mm256_set1_epi64x(four);
        each<C>(NG_BODY(c) { multiply_add(acc[r][c], weights[c], activations); });
      });
    };
    for (int k = 0; k < kq; k += U, x += 8 * U, b += 64 * U) {
      for (int i = 0; i < F; i++, next += stride) prefetch(next);
      each<U>(step);
    }
    each<R>(NG_BODY(r) {
      each<C / 2>(NG_BODY(half) {
        // hadd works in halves: columns 0 1 4 5 | 2 3 6 7 of the eight; the permutation puts them in order.
        const __m256i pairs = _mm256_hadd_epi32(acc[r][2 * half], acc[r][2 * half + 1]);
        const __m256i s = _mm256_permute4x64_epi64(pairs, _MM_SHUFFLE(3, 1, 2, 0));
        __m256i* o = (__m256i*)(out + r * ldo + first + 8 * half);
        _mm256_storeu_si256(o, _mm256_add_epi32(s, add ? _mm256_loadu_si256(o) : _mm256_set1_epi32(-offsets[r])));
      });
    });
  }
}

template <int R, int P>
inline void dot_15(const uint8_t* a, size_t a_stride, int, const uint8_t* w, size_t, int kq, const int32_t* offsets,
                   int32_t* out, int ldo, bool add) {
  static_assert(P == 1, "one panel fills the registers");
  dot_16<R, 1, 0>(a, a_stride, w, kq, offsets, out, ldo, add, nullptr, 0);
}
template <int R, int P>
inline void dot_shared(const uint8_t* a, size_t a_stride, const GroupInfo*, const uint8_t* w, size_t, int groups,
                       const int32_t* offsets, int32_t* out, int ldo, Ahead ahead) {
  static_assert(P == 1, "one panel fills the registers");
  constexpr int kFew = R <= 2 ? 4 : 1, kMany = R <= 2 ? 4 : 2;  // lines fetched by a turn, of which a group has four or eight
  const int kq = groups * kGroup / 4;
  if (ahead.lines > 8)
    dot_16<R, 4, kMany>(a, a_stride, w, kq, offsets, out, ldo, false, ahead.next, 4 * ahead.lines);
  else if (ahead.lines)
    dot_16<R, 4, kFew>(a, a_stride, w, kq, offsets, out, ldo, false, ahead.next, (R <= 2 ? 4 : 8) * ahead.lines);
  else
    dot_16<R, 4, 0>(a, a_stride, w, kq, offsets, out, ldo, false, nullptr, 0);
}

// ---- plain C++ ----------------------------------------------------------------------------------------------------------

#else
constexpr int kMaxRows = 3;
constexpr int kPanelsAtOnce = 1;
constexpr int kFetchFrom = 1;

template <int R, int P>
inline void dot_15(const uint8_t* a, size_t a_stride, int, const uint8_t* w, size_t, int kq, const int32_t* offsets,
                   int32_t* out, int ldo, bool add) {
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
  dot_15<R, P>(a, a_stride, 0, w, w_stride, groups * kGroup / 4, offsets, out, ldo, false);
}
#endif

// ---- int4 -------------------------------------------------------------------------------------------------------------

// Groups of 64 inputs with their own scale. Inside a group sums are exact; over groups floats are added in the order of
// the inputs. A group of a panel: 512 bytes (byte j of 64 * i: column j / 4, inputs 4 i + j % 4 in the low half of the
// byte and 32 + 4 i + j % 4 in the high one, both + 8), then 16 bf16 scales. Activations are bytes on every machine.
//
// The sums of one group's products, for R rows and 16 columns: less 8 times the activations' sum, not yet shifted.
template <int R>
NG_INLINE void dot_group(const uint8_t* a, size_t a_stride, const uint8_t* w, const int32_t* offsets, I32 (&sums)[R]) {
#if defined(__AVX512VNNI__)
  __m512i acc[R];
  each<R>(NG_BODY(r) { acc[r] = _mm512_set1_epi32(-offsets[r]); });
  const __m512i mask = _mm512_set1_epi8(15);
  each<8>(NG_BODY(i) {
    const __m512i both = _mm512_loadu_si512(w + 64 * i);
    const __m512i b0 = _mm512_and_si512(both, mask), b1 = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    each<R>(NG_BODY(r) {
      const uint8_t* row = a + r * a_stride + 4 * i;
      multiply_add(acc[r], b0, broadcast4(row));
      multiply_add(acc[r], b1, broadcast4(row + 32));
    });
  });
  each<R>(NG_BODY(r) { sums[r].v[0] = (NativeU)acc[r]; });
#elif defined(__AVX2__)
  // Pairs of products of 4 with 8 bits are at most 2 * 15 * 127: eight of them fit an int16.
  const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const auto unpacked = [&](const uint8_t* at, bool high) __attribute__((always_inline)) {
    const __m256i both = _mm256_loadu_si256((const __m256i*)at);
    return _mm256_and_si256(high ? _mm256_srli_epi16(both, 4) : both, mask);
  };
  if constexpr (R <= 4) {  // 16 columns at once; both halves of the bytes in one sum, which is full after 32 inputs
    __m256i wide[R][2];
    each<R>(NG_BODY(r) { wide[r][0] = wide[r][1] = _mm256_set1_epi32(-offsets[r]); });
    for (int half = 0; half < 2; half++, a += 16, w += 256) {
      __m256i acc[R][2];
      each<R>(NG_BODY(r) { acc[r][0] = acc[r][1] = _mm256_setzero_si256(); });
      each<8>(NG_BODY(i) {
        const uint8_t* at = w + i / 2 * 64;
        const __m256i b[2] = {unpacked(at, i % 2), unpacked(at + 32, i % 2)};
        each<R>(NG_BODY(r) {
          const __m256i x = broadcast4(a + r * a_stride + i / 2 * 4 + i % 2 * 32);
          each<2>(NG_BODY(c) { multiply_add_bytes(acc[r][c], b[c], x); });
        });
      });
      each<R>(NG_BODY(r) {
        each<2>(NG_BODY(c) { wide[r][c] = _mm256_add_epi32(wide[r][c], _mm256_madd_epi16(acc[r][c], ones)); });
      });
    }
    each<R>(NG_BODY(r) { each<2>(NG_BODY(c) { sums[r].v[c] = (NativeU)wide[r][c]; }); });
  } else {  // 8 columns and then 8, because of the registers
    each<2>(NG_BODY(c) {
      __m256i low[R], high[R];
      each<R>(NG_BODY(r) { low[r] = high[r] = _mm256_setzero_si256(); });
      for (int i = 0; i < 8; i++) {
        const uint8_t* at = w + 64 * i + 32 * c;
        const __m256i b0 = unpacked(at, false), b1 = unpacked(at, true);
        each<R>(NG_BODY(r) {
          const uint8_t* row = a + r * a_stride + 4 * i;
          multiply_add_bytes(low[r], b0, broadcast4(row));
          multiply_add_bytes(high[r], b1, broadcast4(row + 32));
        });
      }
      each<R>(NG_BODY(r) {
        const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(low[r], ones), _mm256_madd_epi16(high[r], ones));
        sums[r].v[c] = (NativeU)_mm256_sub_epi32(both, _mm256_set1_epi32(offsets[r]));
      });
    });
  }
#elif defined(__ARM_FEATURE_DOTPROD)
  int32x4_t acc[R][4];
  each<R>(NG_BODY(r) { each<4>(NG_BODY(c) { acc[r][c] = vdupq_n_s32(0); }); });
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
  (void)offsets;
  each<R>(NG_BODY(r) { each<4>(NG_BODY(c) { sums[r].v[c] = (NativeU)vreinterpretq_u32_s32(acc[r][c]); }); });
#else
  for (int r = 0; r < R; r++) {
    alignas(64) int32_t acc[16];
    for (int c = 0; c < 16; c++) acc[c] = -offsets[r];
    for (int i = 0; i < 512; i++) {
      const int8_t* x = reinterpret_cast<const int8_t*>(a + r * a_stride) + i / 64 * 4 + i % 4;
      acc[i % 64 / 4] += (w[i] & 15) * x[0] + (w[i] >> 4) * x[32];
    }
    sums[r] = load(acc);
  }
#endif
}

template <int R>
inline void dot_i4(const uint8_t* a, size_t a_stride, const GroupInfo* info, const uint8_t* w, int groups, float* out,
                   int ldo, Ahead ahead) {
  F32 total[R];
  each<R>(NG_BODY(r) { total[r] = splat(0.0f); });
  for (int g = 0; g < groups; g++, a += kGroup, w += kGroupBytes, info++) {
    int32_t offsets[R], exponents[R];
    each<R>(NG_BODY(r) {
      GroupInfo one;
      std::memcpy(&one, (const uint8_t*)info + r * a_stride, sizeof one);
      exponents[r] = one.exponent;
      offsets[r] = one.sum * 8;
    });
    I32 sums[R];
    dot_group<R>(a, a_stride, w, offsets, sums);
    const F32 scale = load_bf16(w + 512);
    each<R>(NG_BODY(r) { total[r] = fma(to_float(shift_left(sums[r], exponents[r])), scale, total[r]); });
    for (int i = 0; i < ahead.lines; i++, ahead.next += 64) prefetch(ahead.next);
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
