// Products of a few activation rows with a few panels. Integer instructions are in dot_*.h alone, one file an instruction
// set, of which one is compiled:
//   dot_shared<R, P>  R rows of a matrix's input with P panels of int8
//   dot_15<R, P>      R rows of 15-bit integers with P panels of int8: attention
//   dot_group<R>      R rows with one group of an int4 panel
//
// Weights, K and V are int8, kept as unsigned bytes w + 128 (int4: w + 8), because x86 multiplies unsigned with signed.
// The product then holds 128 times the activations' sum too much, which is one number a row: `offsets`, 128 * sum.
// Every sum is exact in 32 bits, modulo 2^32 on the way, so all instruction sets give the same number in any order.
//
// Two kinds of quantized activations (activations.h):
//   shared exponents (a matrix's input)  q * 2^e: q in -93 .. 93, e in 0 .. 7 one exponent a group of 64 inputs
//   15 bits          (attention)         an integer a, |a| <= 16383
// A shared exponent costs one product and a shift a group where 15 bits cost two products. Where the unit wants it (AMX,
// plain C++) the shift is made beforehand: a = q << e. Same number, same bits. Products with int4 take q as bytes everywhere.
#pragma once

#include "activations.h"

namespace nanogpt {
namespace {

// What to fetch into the L2 cache on the way: so many lines a group of 64 inputs. A panel is used for all rows before
// the next one is begun, and without this the first rows would wait for memory while it had nothing to do before.
struct Ahead {
  const uint8_t* next = nullptr;
  int lines = 0;
};
constexpr int kFewRows = 2;  // up to here attention waits for memory: dot_15 fetches as it reads, `ahead` bytes further on

}  // namespace
}  // namespace nanogpt

#if defined(__AVX512VNNI__)
#include "dot_avx512vnni.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "dot_neon.h"
#elif defined(__AVX2__)
#include "dot_avx2.h"
#else
#include "dot_portable.h"
#endif

namespace nanogpt {
namespace {

// int4: groups of 64 inputs with their own scale. Inside a group sums are exact; over groups floats are added in the order
// of the inputs. A group of a panel: 512 bytes (byte j of 64 * i: column j / 4, inputs 4 i + j % 4 in the low half of the
// byte and 32 + 4 i + j % 4 in the high one, both + 8), then 16 bf16 scales. `dot_group` gives the sums of one group's
// products with 2^e, less 8 times the activations'.
template <int R>
inline void dot_i4(const uint8_t* a, size_t a_stride, const uint8_t* w, int groups, float* out, int ldo, Ahead ahead) {
  F32 total[R];
  each<R>(NG_BODY(r) { total[r] = splat(0.0f); });
  for (int g = 0; g < groups; g++, w += kGroupBytes) {
    I32 sums[R];
    dot_group<R>(a, a_stride, groups, g, w, sums);
    const F32 scale = load_bf16(w + 512);
    each<R>(NG_BODY(r) { total[r] = fma(to_float(sums[r]), scale, total[r]); });
    for (int i = 0; i < ahead.lines; i++, ahead.next += 64) prefetch(ahead.next);
  }
  each<R>(NG_BODY(r) { store(out + r * ldo, total[r]); });
}

// An int4 panel's groups [g0, g0 + n) as unsigned bytes w + 8, which lie as int8's do.
inline void unpack_i4(const uint8_t* panel, int g0, int n, uint8_t* bytes) {
  for (int g = g0; g < g0 + n; g++, bytes += 1024) {
    const uint8_t* w = panel + size_t(g) * kGroupBytes;
    for (int i = 0; i < 512; i++) {
      bytes[i] = w[i] & 15;
      bytes[512 + i] = w[i] >> 4;
    }
  }
}

// float32: every column's sum runs over the inputs in order, whatever R and P are.
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
