// Products on AVX2 (dot.h), whose only product of bytes can saturate: activations_avx2.h says why it does not.
#pragma once

#include "activations_avx2.h"

namespace nanogpt {
namespace {

constexpr int kMaxRows = 5;
constexpr int kPanelsAtOnce = 1;
constexpr int kFetchFrom = 1;
constexpr ActFormat kInt8Input = ActFormat::kPairs, kInt4Input = ActFormat::kPairs;
using Row = PairsRow;

constexpr size_t kRowGroupBytes = kPairsRowGroup;

NG_INLINE __m256i broadcast4(const void* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// acc += products of int16, two a lane / of u8 x s8 into int16, two a lane / of u8 x s8 times a factor, four a lane. As
// instructions: from intrinsics GCC 12 makes sums of products first, which takes more registers than there are.
NG_INLINE void multiply_add(__m256i& acc, const __m256i& w, const __m256i& a) {
  __m256i product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(w), "x"(a));
}
NG_INLINE void multiply_add_bytes(__m256i& acc, const __m256i& w, const __m256i& a) {
  __m256i product;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(w), "x"(a));
}
NG_INLINE void multiply_add_pairs(__m256i& acc, const __m256i& w, const __m256i& a, const __m256i& factor) {
  __m256i product;
  asm("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
      : "+x"(acc), "=&x"(product) : "x"(w), "x"(a), "x"(factor));
}
// acc = the products + start.
NG_INLINE void multiply_bytes(__m256i& acc, const __m256i& w, const __m256i& a, const __m256i& start) {
  asm("vpmaddubsw %2, %1, %0" : "=x"(acc) : "x"(w), "x"(a));
  asm("vpaddw %1, %0, %0" : "+x"(acc) : "x"(start));
}
// acc += pairs of int16 times the factor in memory, at row + i. The compiler is told an address and not what lies there:
// for an operand in memory it would write all sums to memory first, as they might lie there. `settled` keeps it right.
NG_INLINE void widen_add(__m256i& acc, __m256i& pairs, const uint8_t* row, size_t i) {
  asm("vpmaddwd (%2,%3), %1, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "+x"(pairs) : "r"(row), "r"(i));
}
// The pointer, with everything written that it may point to.
NG_INLINE const uint8_t* settled(const uint8_t* p) {
  asm volatile("" : "+r"(p) : : "memory");
  return p;
}

// The products of a row's list.
NG_INLINE void add_apart(const uint8_t* list, const uint8_t* w, int32_t* out) {
  int32_t count;
  std::memcpy(&count, list, 4);
  if (count == 0) return;
  __m256i s0 = load32(out), s1 = load32(out + 8);
  for (const uint8_t *one = list + 4, *end = one + count * sizeof(Apart); one != end; one += sizeof(Apart)) {
    uint32_t four;
    std::memcpy(&four, one + offsetof(Apart, four), 4);
    const __m256i x = broadcast4(one), e = broadcast4(one + offsetof(Apart, factor));
    multiply_add_pairs(s0, load32(w + size_t(four) * 64), x, e);
    multiply_add_pairs(s1, load32(w + size_t(four) * 64 + 32), x, e);
  }
  _mm256_storeu_si256((__m256i*)out, s0);
  _mm256_storeu_si256((__m256i*)(out + 8), s1);
}

// On the way F lines at `next` are fetched for every block of 16 inputs, `stride` bytes from one to the next. A function of
// its own: written into its caller, GCC has fewer registers for it, and it takes a third longer.
template <int R, int F>
NG_OUTLINE void dot_pairs(const uint8_t* a, size_t a_stride, const uint8_t* w, int groups, const int32_t* offsets,
                          int32_t* out, int ldo, const uint8_t* next, size_t stride) {
  __m256i acc[R][2];
  const uint8_t *row[R], *b = w;
  each<R>(NG_BODY(r) {
    row[r] = settled(a + r * a_stride);
    acc[r][0] = acc[r][1] = _mm256_set1_epi32(-offsets[r]);
  });
  size_t at = 0, factor = kPairsFactor;
  for (int g = 0; g < groups; g++, at += kPairsGroup - kGroup, factor += kPairsGroup) {
    size_t start = factor + kPairsStart - kPairsFactor;
    for (int k = 0; k < kGroup; k += kBlock, at += kBlock, start += 4, b += 4 * 64) {
      for (int i = 0; i < F; i++, next += stride) prefetch(next);
      __m256i sums[R][2];
      each<4>(NG_BODY(i) {
        const __m256i weights[2] = {load32(b + 64 * i), load32(b + 64 * i + 32)};
        each<R>(NG_BODY(r) {
          const __m256i x = broadcast4(row[r] + at + 4 * i);
          if constexpr (i == 0) {
            const __m256i first = broadcast4(row[r] + start);
            each<2>(NG_BODY(c) { multiply_bytes(sums[r][c], weights[c], x, first); });
          } else {
            each<2>(NG_BODY(c) { multiply_add_bytes(sums[r][c], weights[c], x); });
          }
        });
      });
      each<R>(NG_BODY(r) { each<2>(NG_BODY(c) { widen_add(acc[r][c], sums[r][c], row[r], factor); }); });
    }
  }
  each<R>(NG_BODY(r) {
    each<2>(NG_BODY(c) { _mm256_storeu_si256((__m256i*)(out + r * ldo + 8 * c), acc[r][c]); });
  });
  for (int r = 0; r < R; r++) add_apart(a + r * a_stride + groups * kPairsGroup, w, out + r * ldo);
}
template <int R, int P>
inline void dot_shared(const uint8_t* a, size_t a_stride, const GroupInfo*, const uint8_t* w, size_t, int groups,
                       const int32_t* offsets, int32_t* out, int ldo, Ahead ahead) {
  static_assert(P == 1, "one panel fills the registers");
  if (ahead.lines > 8)
    dot_pairs<R, 4>(a, a_stride, w, groups, offsets, out, ldo, ahead.next, 4 * ahead.lines);
  else if (ahead.lines > 4)
    dot_pairs<R, 2>(a, a_stride, w, groups, offsets, out, ldo, ahead.next, 8 * ahead.lines);
  else if (ahead.lines)
    dot_pairs<R, 1>(a, a_stride, w, groups, offsets, out, ldo, ahead.next, 16 * ahead.lines);
  else
    dot_pairs<R, 0>(a, a_stride, w, groups, offsets, out, ldo, nullptr, 0);
}

// For one or two rows a panel's 16 columns at once, for more 8 and then 8: so all sums stay in registers. A column has two
// in an accumulator, of inputs 0 + 1 and 2 + 3 of four.
template <int R, int P>
inline void dot_15(const uint8_t* a, size_t a_stride, int, const uint8_t* w, size_t, int kq, const int32_t* offsets,
                   int32_t* out, int ldo, bool add, size_t ahead) {
  static_assert(P == 1, "one panel fills the registers");
  constexpr int C = R <= 2 ? 4 : 2;
  for (int first = 0; first < 16; first += 4 * C) {
    __m256i acc[R][C];
    each<R>(NG_BODY(r) { each<C>(NG_BODY(c) { acc[r][c] = _mm256_setzero_si256(); }); });
    const uint8_t *x = a, *b = w + 4 * first;
    for (int k = 0; k < kq; k++, x += 8, b += 64) {
      if constexpr (R <= kFewRows) prefetch_near(b + ahead);
      __m256i weights[C];
      each<C>(NG_BODY(c) { weights[c] = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(b + 16 * c))); });
      each<R>(NG_BODY(r) {
        int64_t four;
        std::memcpy(&four, x + r * a_stride, 8);
        const __m256i activations = _mm256_set1_epi64x(four);
        each<C>(NG_BODY(c) { multiply_add(acc[r][c], weights[c], activations); });
      });
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

// A lane takes two products of 4 with 8 bits a step, 32 in all. With 8 times their activations taken off, which is what it
// begins with, they fit an int16, at most 8 * 93 * 32; on the way it wraps.
template <int R>
NG_INLINE void dot_group(const uint8_t* a, size_t a_stride, int groups, int g, const uint8_t* w, I32 (&sums)[R]) {
  const __m256i mask = _mm256_set1_epi8(15);
  __m256i acc[R][2];
  each<R>(NG_BODY(r) { acc[r][0] = acc[r][1] = broadcast4(a + r * a_stride + groups * kPairs4Group + g * 4); });
  a += g * kPairs4Group;
  for (int k = 0; k < kGroup / 2; k += 8, w += 128) {
    each<4>(NG_BODY(i) {  // the low halves of 64 bytes, the high ones, and again
      __m256i weights[2] = {load32(w + i / 2 * 64), load32(w + i / 2 * 64 + 32)};
      each<2>(NG_BODY(c) {
        weights[c] = _mm256_and_si256(i % 2 ? _mm256_srli_epi16(weights[c], 4) : weights[c], mask);
      });
      each<R>(NG_BODY(r) {
        const __m256i x = broadcast4(a + r * a_stride + k + i / 2 * 4 + i % 2 * 32);
        each<2>(NG_BODY(c) { multiply_add_bytes(acc[r][c], weights[c], x); });
      });
    });
  }
  each<R>(NG_BODY(r) {
    const __m256i factor = load32(a + r * a_stride + kGroup);
    each<2>(NG_BODY(c) { sums[r].v[c] = (NativeU)_mm256_madd_epi16(acc[r][c], factor); });
  });
}

}  // namespace
}  // namespace nanogpt
