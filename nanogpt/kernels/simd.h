// Sixteen lanes of float and of int32, on every instruction set alike.
//
// The lanes are held in as many native registers as it takes (1 on AVX-512, 2 on AVX2, 4 on NEON and SSE2) through the
// compiler's vector types. Every operation is one IEEE operation a lane, and multiply-adds are fused only where
// `fma` is written: that, and the fixed order of `sum`, is why all instruction sets give the same bits.
// Included only by the isa_*.cc files, each in its own anonymous namespace: nothing here may be shared between
// translation units that were compiled for different machines.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define NG_INLINE inline __attribute__((always_inline))
#define NG_OUTLINE [[gnu::noinline]] inline

namespace nanogpt {
namespace {

#if defined(__AVX512F__)
constexpr int kNative = 16;
#elif defined(__AVX2__)
constexpr int kNative = 8;
#else
constexpr int kNative = 4;
#endif
constexpr int kParts = 16 / kNative;

typedef float NativeF __attribute__((vector_size(kNative * 4)));
typedef int32_t NativeI __attribute__((vector_size(kNative * 4)));
typedef uint32_t NativeU __attribute__((vector_size(kNative * 4)));
// The same in memory: wherever a float may lie, whatever it is declared as.
typedef float LooseF __attribute__((vector_size(kNative * 4), aligned(4), may_alias));
typedef uint32_t LooseU __attribute__((vector_size(kNative * 4), aligned(4), may_alias));

struct F32 {
  NativeF v[kParts];
};
struct I32 {
  NativeU v[kParts];  // unsigned: sums wrap, by definition
};

// body(0), body(1) .. body(N - 1) with constants for arguments: arrays that are indexed in it stay in registers, which
// GCC does not manage for unrolled loops.
template <class Body, int... I>
NG_INLINE void each_of(std::integer_sequence<int, I...>, const Body& body) {
  (body(std::integral_constant<int, I>{}), ...);
}
template <int N, class Body>
NG_INLINE void each(const Body& body) {
  each_of(std::make_integer_sequence<int, N>{}, body);
}
#define NG_BODY(i) [&](auto i) __attribute__((always_inline))

// body(n) with n, which is 1 .. N, as a constant.
template <int N, class Body>
NG_INLINE void with_constant(int n, const Body& body) {
  if constexpr (N > 1) {
    if (n != N) return with_constant<N - 1>(n, body);
  }
  body(std::integral_constant<int, N>{});
}

#define NG_LANES for (int i = 0; i < kParts; i++)

// A register at a time: GCC copies all 64 bytes at once through the stack, in pieces that a register's load then waits for.
NG_INLINE F32 load(const float* p) {
  F32 r;
  NG_LANES r.v[i] = *(const LooseF*)(p + i * kNative);
  return r;
}
NG_INLINE I32 load(const int32_t* p) {
  I32 r;
  NG_LANES r.v[i] = *(const LooseU*)(p + i * kNative);
  return r;
}
// Sixteen bf16.
NG_INLINE F32 load_bf16(const uint8_t* p) {
  F32 r;
#if defined(__AVX512F__)
  r.v[0] = (NativeF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  NG_LANES r.v[i] = (NativeF)_mm256_slli_epi32(
      _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 16 * i))), 16);
#else
  uint16_t half[16];
  std::memcpy(half, p, 32);
  uint32_t wide[16];
  for (int i = 0; i < 16; i++) wide[i] = uint32_t(half[i]) << 16;
  std::memcpy(&r, wide, 64);
#endif
  return r;
}
NG_INLINE void store(float* p, const F32& a) { NG_LANES *(LooseF*)(p + i * kNative) = a.v[i]; }
NG_INLINE void store(int32_t* p, const I32& a) { NG_LANES *(LooseU*)(p + i * kNative) = a.v[i]; }

NG_INLINE F32 splat(float x) {
  F32 r;
  NG_LANES r.v[i] = x - NativeF{};
  return r;
}
NG_INLINE I32 splat(int32_t x) {
  I32 r;
  NG_LANES r.v[i] = uint32_t(x) - NativeU{};
  return r;
}
NG_INLINE I32 iota() {
  alignas(64) static constexpr int32_t kIota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(kIota);
}

#define NG_BINARY(T, op)                          \
  NG_INLINE T operator op(const T& a, const T& b) { \
    T r;                                          \
    NG_LANES r.v[i] = a.v[i] op b.v[i];           \
    return r;                                     \
  }
NG_BINARY(F32, +)
NG_BINARY(F32, -)
NG_BINARY(F32, *)
NG_BINARY(F32, /)
NG_BINARY(I32, +)
NG_BINARY(I32, -)
NG_BINARY(I32, *)
NG_BINARY(I32, &)
NG_BINARY(I32, |)
#undef NG_BINARY

NG_INLINE I32 shift_left(const I32& a, int n) {
  I32 r;
  NG_LANES r.v[i] = a.v[i] << n;
  return r;
}
NG_INLINE I32 shift_right(const I32& a, int n) {  // logical
  I32 r;
  NG_LANES r.v[i] = a.v[i] >> n;
  return r;
}
NG_INLINE I32 shift_right_signed(const I32& a, int n) {
  I32 r;
  NG_LANES r.v[i] = (NativeU)((NativeI)a.v[i] >> n);
  return r;
}
NG_INLINE I32 bits(const F32& a) {
  I32 r;
  NG_LANES r.v[i] = (NativeU)a.v[i];
  return r;
}
NG_INLINE F32 from_bits(const I32& a) {
  F32 r;
  NG_LANES r.v[i] = (NativeF)a.v[i];
  return r;
}
NG_INLINE F32 to_float(const I32& a) {
  F32 r;
  NG_LANES r.v[i] = __builtin_convertvector((NativeI)a.v[i], NativeF);
  return r;
}

// a * b + c, rounded once.
NG_INLINE F32 fma(const F32& a, const F32& b, const F32& c) {
  F32 r;
#if defined(__AVX512F__)
  r.v[0] = (NativeF)_mm512_fmadd_ps((__m512)a.v[0], (__m512)b.v[0], (__m512)c.v[0]);
#elif defined(__FMA__)
  NG_LANES r.v[i] = (NativeF)_mm256_fmadd_ps((__m256)a.v[i], (__m256)b.v[i], (__m256)c.v[i]);
#elif defined(__aarch64__)
  NG_LANES r.v[i] = (NativeF)vfmaq_f32((float32x4_t)c.v[i], (float32x4_t)a.v[i], (float32x4_t)b.v[i]);
#else
  NG_LANES for (int j = 0; j < kNative; j++) r.v[i][j] = __builtin_fmaf(a.v[i][j], b.v[i][j], c.v[i][j]);
#endif
  return r;
}

// All ones where a > b. Lanes with NaN compare false.
NG_INLINE I32 greater(const F32& a, const F32& b) {
  I32 r;
  NG_LANES r.v[i] = (NativeU)(a.v[i] > b.v[i]);
  return r;
}
NG_INLINE I32 less(const I32& a, const I32& b) {  // signed
  I32 r;
  NG_LANES r.v[i] = (NativeU)((NativeI)a.v[i] < (NativeI)b.v[i]);
  return r;
}
NG_INLINE F32 select(const I32& mask, const F32& yes, const F32& no) {
  F32 r;
  NG_LANES r.v[i] = (NativeF)(((NativeU)yes.v[i] & mask.v[i]) | ((NativeU)no.v[i] & ~mask.v[i]));
  return r;
}
// The larger lane; `b` where either is NaN. Written out as x86's own rule, so that it is one instruction there.
NG_INLINE F32 max(const F32& a, const F32& b) {
  F32 r;
#if defined(__AVX512F__)
  r.v[0] = (NativeF)_mm512_max_ps((__m512)a.v[0], (__m512)b.v[0]);
#elif defined(__AVX2__)
  NG_LANES r.v[i] = (NativeF)_mm256_max_ps((__m256)a.v[i], (__m256)b.v[i]);
#else
  r = select(greater(a, b), a, b);
#endif
  return r;
}
NG_INLINE F32 abs(const F32& a) { return from_bits(bits(a) & splat(int32_t(0x7fffffff))); }

// Sixteen lanes to one, always in this order: the upper half is folded onto the lower one, four times.
template <class Fold>
NG_INLINE float fold_lanes(const F32& a, const Fold& fold) {
#if defined(__AVX512F__)
  const __m512 all = (__m512)a.v[0];
  const __m256 eight = fold(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#elif defined(__AVX2__)
  const __m256 eight = fold((__m256)a.v[0], (__m256)a.v[1]);
#endif
#if defined(__AVX2__)
  const __m128 four = fold(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = fold(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(fold(two, _mm_movehdup_ps(two)));
#else
  float t[16];
  store(t, a);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) t[i] = fold(t[i], t[i + half]);
  return t[0];
#endif
}
struct Add {
  template <class T>
  NG_INLINE T operator()(const T& a, const T& b) const {
    return a + b;
  }
};
struct Larger {
#if defined(__AVX2__)
  NG_INLINE __m256 operator()(const __m256& a, const __m256& b) const { return _mm256_max_ps(a, b); }
  NG_INLINE __m128 operator()(const __m128& a, const __m128& b) const { return _mm_max_ps(a, b); }
#endif
  NG_INLINE float operator()(float a, float b) const { return a > b ? a : b; }
};
NG_INLINE float sum(const F32& a) { return fold_lanes(a, Add()); }
NG_INLINE float max_lane(const F32& a) { return fold_lanes(a, Larger()); }

NG_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
NG_INLINE void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }  // into the L1 cache

// Any order gives the same.
NG_INLINE int32_t sum(const I32& a) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)a.v[0]);
#elif defined(__AVX2__)
  const __m256i eight = (__m256i)(a.v[0] + a.v[1]);
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
#else
  NativeU t = a.v[0];
  for (int i = 1; i < kParts; i++) t += a.v[i];
  uint32_t total = 0;
  for (int i = 0; i < kNative; i++) total += t[i];
  return int32_t(total);
#endif
}
// To the nearest integer, ties to even, for |a| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits.
NG_INLINE I32 round_to_int(const F32& a) {
  const F32 magic = splat(12582912.0f);
  return bits(a + magic) - bits(magic);
}
NG_INLINE int32_t round_to_int(float a) {
  const float magic = 12582912.0f, moved = a + magic;
  int32_t before, after;
  std::memcpy(&before, &magic, 4);
  std::memcpy(&after, &moved, 4);
  return after - before;
}

}  // namespace
}  // namespace nanogpt
