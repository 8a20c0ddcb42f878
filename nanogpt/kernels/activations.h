// How quantized activations lie in memory: what rows.h writes and the products (dot.h) read.
#pragma once

#include "layout.h"
#include "simd.h"

namespace nanogpt {
namespace {

// A row of a matrix's input. Groups of 64 have an exponent e: a value is q * 2^e, q in -127 .. 127, e in 0 .. 7.
enum class ActFormat {
  kBytes,   // q
  kShorts,  // q << e as int16
  kPlanes,  // q << e as two planes of int8: AMX
  kPairs,   // q as AVX2 multiplies them with int8: below
  kPairs4,  // q as AVX2 multiplies them with int4
};

// All formats but pairs: 2 * k_pad bytes for the values, then this for every group.
struct GroupInfo {
  int32_t exponent;
  int32_t sum;  // of q
};
NG_INLINE GroupInfo group_info(const uint8_t* row, int groups, int g) {
  GroupInfo info;
  std::memcpy(&info, row + groups * 2 * kGroup + g * sizeof info, sizeof info);
  return info;
}

#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool kBytes = true;  // byte products; 15 bits as two planes of int8, a = 256 high + low
#else
constexpr bool kBytes = false;  // 15 bits as int16
#endif

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

// Pairs. AVX2's product of bytes adds two neighbours in 16 bits. With weights of up to 255 the sum fits as long as the two
// activations add up to at most 128 either way, which nearly all do: of normally distributed inputs 97 of 100 pairs. Four
// inputs of which a pair does not are *crowded*: they are halved where they lie, and the other half is an entry of a list.
// So nothing saturates and sums stay exact, whatever the input is.
//
// A row: for every group 64 bytes of q, then sixteen int16 2^e. With int8 an int32 follows, how many fours are crowded, and
// then those; with int4 for every group -8 times the sums of q, of inputs 0 and 1 of every four and of 2 and 3, as int16.
constexpr size_t kPairsGroup = kGroup + 32;
struct Crowded {
  int8_t rest[4];     // what is missing
  int16_t factor[2];  // 2^e
  uint32_t four;      // which four inputs
};

// Bit i: inputs 4 i .. 4 i + 4 of these 32 are crowded.
NG_INLINE uint32_t crowded_fours(const int8_t* q) {
#if defined(__AVX2__)
  const __m256i sums = _mm256_maddubs_epi16(_mm256_set1_epi8(1), _mm256_loadu_si256((const __m256i*)q));
  const __m256i over = _mm256_cmpgt_epi16(_mm256_abs_epi16(sums), _mm256_set1_epi16(128));
  const __m256i fours = _mm256_or_si256(over, _mm256_slli_epi32(over, 16));  // their top bits: either of two
  return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(fours)));
#else
  uint32_t crowded = 0;
  for (int i = 0; i < 16; i++) {
    const int sum = q[2 * i] + q[2 * i + 1];
    crowded |= uint32_t(sum > 128 || sum < -128) << i / 2;
  }
  return crowded;
#endif
}

// The factor of a group whose q lie at `group`.
NG_INLINE void put_factor(uint8_t* group, int16_t factor) {
  int16_t all[16];
  for (int16_t& one : all) one = factor;
  std::memcpy(group + kGroup, all, sizeof all);
}
// Completes group g of a row for int4. `total`: its q, lane i with those of inputs i, 16 + i, 32 + i and 48 + i; together
// `sum_of_all`.
NG_INLINE void put_pair_sums(uint8_t* row, int groups, int g, int exponent, const I32& total, int32_t sum_of_all) {
  put_factor(row + g * kPairsGroup, int16_t(1 << exponent));
  alignas(64) static constexpr int32_t kFirst[16] = {-1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0};
  const int32_t first = sum(total & load(kFirst));
  const int16_t start[2] = {int16_t(-8 * first), int16_t(-8 * (sum_of_all - first))};
  std::memcpy(row + groups * kPairsGroup + g * 4, start, 4);
}
// Completes group g of a row for int8. `count`: how many were crowded before; goes on.
NG_INLINE void set_crowded_apart(uint8_t* row, int groups, int g, int exponent, int32_t* count) {
  const int16_t factor = int16_t(1 << exponent);
  int8_t* q = reinterpret_cast<int8_t*>(row + g * kPairsGroup);
  put_factor(row + g * kPairsGroup, factor);
  uint8_t* list = row + groups * kPairsGroup;
  for (uint32_t crowded = crowded_fours(q) | crowded_fours(q + 32) << 8; crowded; crowded &= crowded - 1) {
    const int i = __builtin_ctz(crowded);
    Crowded one{{}, {factor, factor}, uint32_t(g * (kGroup / 4) + i)};
    for (int j = 0; j < 4; j++) {
      const int8_t all = q[4 * i + j], half = int8_t(all >> 1);
      one.rest[j] = int8_t(all - half);
      q[4 * i + j] = half;
    }
    std::memcpy(list + 4 + (*count)++ * sizeof one, &one, sizeof one);
  }
  std::memcpy(list, count, 4);
}

}  // namespace
}  // namespace nanogpt
