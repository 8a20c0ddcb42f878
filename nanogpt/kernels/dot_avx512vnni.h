// Products on AVX-512 VNNI (dot.h): one instruction multiplies 64 unsigned bytes with 64 signed ones and adds four to a lane.
#pragma once

#include "activations.h"

namespace nanogpt {
namespace {

constexpr int kMaxRows = 6;
constexpr ActFormat kInt8Input = ActFormat::kBytes, kInt4Input = ActFormat::kBytes;
using Row = PlainRow;
constexpr size_t kRowGroupBytes = 2 * kGroup + sizeof(GroupInfo);  // two planes for AMX
constexpr int kPanelsAtOnce = 4;  // for up to three rows, and two for more: as many sums as there are registers
constexpr int kUnpackFrom = 13;  // rows: from here on int4 is unpacked once for all of them
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

// s += the products of R rows with a group of P panels; a, w and ahead go on to the next group. Lines are fetched one by one:
// all at once they hold up the loads.
template <int R, int P>
NG_INLINE void add_group(const uint8_t*& a, size_t a_stride, const uint8_t*& w, size_t w_stride, Ahead& ahead,
                         __m512i (&s)[R][P]) {
  for (int k = 0; k < 16; k++, a += 4, w += 64) {
    if (k < ahead.lines) {
      prefetch(ahead.next);
      ahead.next += 64;
    }
    __m512i b[P];
    each<P>(NG_BODY(p) { b[p] = _mm512_loadu_si512(w + p * w_stride); });
    each<R>(NG_BODY(r) {
      const __m512i x = broadcast4(a + r * a_stride);
      each<P>(NG_BODY(p) { multiply_add(s[r][p], b[p], x); });
    });
  }
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
    add_group<R, P>(a, a_stride, w, w_stride, ahead, s);
    each<R>(NG_BODY(r) {
      const __m512i e = broadcast4((const uint8_t*)info + r * a_stride);
      each<P>(NG_BODY(p) { total[r][p] = _mm512_add_epi32(total[r][p], _mm512_sllv_epi32(s[r][p], e)); });
    });
    for (int i = 16; i < ahead.lines; i++, ahead.next += 64) prefetch(ahead.next);
  }
  each<R>(NG_BODY(r) { each<P>(NG_BODY(p) { _mm512_storeu_si512(out + r * ldo + kLanes * p, total[r][p]); }); });
}

template <int R, int P>
inline void dot_15(const uint8_t* a, size_t a_stride, int plane, const uint8_t* w, size_t w_stride, int kq,
                   const int32_t* offsets, int32_t* out, int ldo, bool add, size_t ahead) {
  __m512i hi[R][P], lo[R][P];
  each<R>(NG_BODY(r) { each<P>(NG_BODY(p) { hi[r][p] = lo[r][p] = _mm512_setzero_si512(); }); });
  for (int k = 0; k < kq; k++, a += 4, w += 64) {
    __m512i b[P];
    each<P>(NG_BODY(p) {
      b[p] = _mm512_loadu_si512(w + p * w_stride);
      if constexpr (R <= kFewRows) prefetch(w + p * w_stride + ahead);
    });
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

// What dot_i4 does, of P panels' n groups that were unpacked to bytes; `scales` is the first group's. The rest of a sum
// lies in `totals` meanwhile, if `add` says that there is one.
template <int R, int P>
inline void dot_unpacked(const uint8_t* a, size_t a_stride, const GroupInfo* info, const uint8_t* w, size_t w_stride,
                         const uint8_t* scales, size_t panel_bytes, int n, float* totals, int ld, bool add, Ahead ahead) {
  F32 total[R][P];
  each<R>(NG_BODY(r) {
    each<P>(NG_BODY(p) { total[r][p] = add ? load(totals + r * ld + kLanes * p) : splat(0.0f); });
  });
  for (int g = 0; g < n; g++, info++, scales += kGroupBytes) {
    __m512i s[R][P];
    each<R>(NG_BODY(r) {
      const __m512i start = broadcast4((const uint8_t*)&info->start + r * a_stride);
      each<P>(NG_BODY(p) { s[r][p] = start; });
    });
    add_group<R, P>(a, a_stride, w, w_stride, ahead, s);
    F32 scale[P];
    each<P>(NG_BODY(p) { scale[p] = load_bf16(scales + p * panel_bytes); });
    each<R>(NG_BODY(r) {
      const __m512i e = broadcast4((const uint8_t*)&info->exponent + r * a_stride);
      each<P>(NG_BODY(p) {
        I32 sum;
        sum.v[0] = (NativeU)_mm512_sllv_epi32(s[r][p], e);
        total[r][p] = fma(to_float(sum), scale[p], total[r][p]);
      });
    });
    for (int i = 16; i < ahead.lines; i++, ahead.next += 64) prefetch(ahead.next);
  }
  each<R>(NG_BODY(r) { each<P>(NG_BODY(p) { store(totals + r * ld + kLanes * p, total[r][p]); }); });
}

template <int R>
NG_INLINE void dot_group(const uint8_t* a, size_t a_stride, int groups, int g, const uint8_t* w, I32 (&sums)[R]) {
  __m512i low[R], high[R];  // one sum alone would wait for itself
  int32_t exponents[R];
  each<R>(NG_BODY(r) {
    const GroupInfo info = group_info(a + r * a_stride, groups, g);
    exponents[r] = info.exponent;
    low[r] = _mm512_set1_epi32(info.start);
    high[r] = _mm512_setzero_si512();
  });
  a += g * kGroup;
  const __m512i mask = _mm512_set1_epi8(15);
  each<8>(NG_BODY(i) {
    const __m512i both = _mm512_loadu_si512(w + 64 * i);
    const __m512i b0 = _mm512_and_si512(both, mask), b1 = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    each<R>(NG_BODY(r) {
      const uint8_t* row = a + r * a_stride + 4 * i;
      multiply_add(low[r], b0, broadcast4(row));
      multiply_add(high[r], b1, broadcast4(row + 32));
    });
  });
  each<R>(NG_BODY(r) { sums[r].v[0] = (NativeU)_mm512_add_epi32(low[r], high[r]) << exponents[r]; });
}

}  // namespace
}  // namespace nanogpt
