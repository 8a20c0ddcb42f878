// Quantized activations as AVX2 multiplies them with int8 and int4: the format kPairs.
//
// AVX2's product of bytes adds two neighbours in 16 bits and saturates. Weights are at most 255 there, so the sum fits as
// long as the two activations add up to at most 128 either way, which nearly all do. Four inputs of which a pair does not
// are halved where they lie, and the other half is an entry of a list, whose products come last.
//
// With int8 four such products are then added in 16 bits before they are widened: eight weights times eight activations of
// a lane, which is inputs 0 and 1, or 2 and 3, of every four of a block of 16. The bytes w + 128 would not fit, but their
// surplus is known beforehand: a lane begins with -128 times its activations, wraps on the way, and ends with the sum of
// w * q. That fits if the length of the eight q (the root of the sum of their squares) times the length of the eight w is at
// most 32767 (Cauchy, Schwarz). The matrix says how long q may be beside the longest w of any column (Matrix::lane_limits);
// where a lane is longer, fours of its block are moved to the list whole, until it is not.
//
// So nothing saturates and sums stay exact, whatever the input is. Of normally distributed inputs and weights one in a
// hundred fours is in the list.
#pragma once

#include "activations.h"

namespace nanogpt {
namespace {

// Input of int4, a row: for every group 64 bytes of q, then sixteen int16 2^e; at the end for every group -8 times the sums
// of q, of inputs 0 and 1 of every four and of 2 and 3, as int16.
constexpr size_t kPairs4Group = kGroup + 32;

// Input of int8, a row: for every group 64 bytes of q, sixteen int16 2^e, then for every block of 16 the two int16 that its
// lanes begin with; at the end an int32, how long the list is, and the list.
constexpr int kBlock = 16;
constexpr size_t kPairsFactor = kGroup, kPairsStart = kPairsFactor + 32, kPairsGroup = 128;
struct Apart {
  int8_t q[4];
  int16_t factor[2];  // 2^e
  uint32_t four;      // which four inputs
};
// A four is in the list at most twice: its half, and what was left.
constexpr size_t kPairsRowGroup = kPairsGroup + 2 * kGroup / 4 * sizeof(Apart);

NG_INLINE __m256i load32(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }

// Bit i: a pair of inputs 4 i .. 4 i + 4 of these 32 adds up to too much.
NG_INLINE uint32_t crowded_fours(const int8_t* q) {
  const __m256i sums = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load32(q));
  const __m256i over = _mm256_cmpgt_epi16(_mm256_abs_epi16(sums), _mm256_set1_epi16(128));
  const __m256i fours = _mm256_or_si256(over, _mm256_slli_epi32(over, 16));  // their top bits: either of two
  return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(fours)));
}

// The sums of every lane of a group: 0 and 1 of block 0, then of block 1, ... `blocks`: a block's eight numbers, one for each
// pair of its inputs, in order.
NG_INLINE __m256i lane_sums(const __m256i (&blocks)[4]) {
  __m256i halves[4];  // a block's lanes 0 1 0 1 in either half
  each<4>(NG_BODY(b) {
    halves[b] = _mm256_add_epi32(blocks[b], _mm256_shuffle_epi32(blocks[b], _MM_SHUFFLE(1, 0, 3, 2)));
  });
  const __m256i low = _mm256_unpacklo_epi64(halves[0], halves[1]), high = _mm256_unpacklo_epi64(halves[2], halves[3]);
  return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

// Bit i: lane i of the group is longer than its limit (a square).
NG_INLINE uint32_t long_lanes(const int8_t* q, const int32_t* limits) {
  __m256i squares[4];
  each<4>(NG_BODY(b) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(q + kBlock * b)));
    squares[b] = _mm256_madd_epi16(wide, wide);
  });
  return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(lane_sums(squares), load32(limits)))));
}

// -128 times the sums of every lane, as int16.
NG_INLINE void put_starts(uint8_t* to, const int8_t* q) {
  each<2>(NG_BODY(half) {  // two blocks: eight sums of pairs each, two of them an int32
    __m256i s = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load32(q + 32 * half));
    s = _mm256_add_epi16(s, _mm256_shuffle_epi32(s, _MM_SHUFFLE(1, 0, 3, 2)));
    s = _mm256_add_epi16(s, _mm256_shuffle_epi32(s, _MM_SHUFFLE(2, 3, 0, 1)));
    s = _mm256_sub_epi16(_mm256_setzero_si256(), _mm256_slli_epi16(s, 7));
    const int32_t start[2] = {_mm256_extract_epi32(s, 0), _mm256_extract_epi32(s, 4)};
    std::memcpy(to + 8 * half, start, 8);
  });
}

NG_INLINE void put_factor(uint8_t* to, int16_t factor) {
  _mm256_storeu_si256((__m256i*)to, _mm256_set1_epi16(factor));
}

// A row's list while it is made.
struct ApartList {
  uint8_t* at;
  int32_t count = 0;
  uint32_t sum = 0;  // of its values, q * 2^e
  NG_INLINE void add(const int8_t (&q)[4], int exponent, int four) {
    const int16_t factor = int16_t(1 << exponent);
    const Apart one{{q[0], q[1], q[2], q[3]}, {factor, factor}, uint32_t(four)};
    std::memcpy(at + 4 + count++ * sizeof one, &one, sizeof one);
    sum += uint32_t(q[0] + q[1] + q[2] + q[3]) << exponent;
  }
};

// Moves fours of a block to the list, those first that are longest in `lane`, until that is within its limit.
inline void shorten_lane(int8_t* q, int lane, int32_t limit, int exponent, int first_four, ApartList& list) {
  const auto square = NG_BODY(i) {
    const int a = q[4 * i + 2 * lane], b = q[4 * i + 2 * lane + 1];
    return a * a + b * b;
  };
  while (square(0) + square(1) + square(2) + square(3) > limit) {
    int longest = 0;
    for (int i = 1; i < 4; i++)
      if (square(i) > square(longest)) longest = i;
    int8_t four[4];
    std::memcpy(four, q + 4 * longest, 4);
    if (square(longest) == 0) return;  // a damaged file's limit
    list.add(four, exponent, first_four + longest);
    std::memset(q + 4 * longest, 0, 4);
  }
}

// Writes the groups of a matrix's input to `row` in order.
struct PairsRow {
  uint8_t* row;
  const Matrix& m;
  ApartList list;
  PairsRow(uint8_t* to, const Matrix& matrix, ActFormat)
      : row(to), m(matrix), list{to + m.k_pad / kGroup * kPairsGroup} {}

  NG_INLINE void group(int g, int exponent, const I32 (&q)[4]) {
    if (m.kind == Kind::kI4)
      for_int4(g, exponent, q);
    else
      for_int8(g, exponent, q);
  }
  // The sum of those activations whose products hold 128 times them too much: of the others lanes begin without it.
  NG_INLINE uint32_t finish() {
    if (m.kind == Kind::kI8) std::memcpy(list.at, &list.count, 4);
    return list.sum;
  }

 private:
  NG_INLINE void for_int4(int g, int exponent, const I32 (&values)[4]) {
    uint8_t* group = row + g * kPairs4Group;
    I32 total = splat(int32_t(0));  // lane i: of inputs i, 16 + i, 32 + i and 48 + i
    each<4>(NG_BODY(j) {
      store_bytes(group + j * 16, values[j]);
      total = total + values[j];
    });
    put_factor(group + kGroup, int16_t(1 << exponent));
    alignas(64) static constexpr int32_t kFirst[16] = {-1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0};
    const int32_t first = sum(total & load(kFirst)), second = sum(total) - first;
    const int16_t start[2] = {int16_t(-8 * first), int16_t(-8 * second)};
    std::memcpy(row + m.k_pad / kGroup * kPairs4Group + g * 4, start, 4);
  }
  NG_INLINE void for_int8(int g, int exponent, const I32 (&values)[4]) {
    uint8_t* group = row + g * kPairsGroup;
    each<4>(NG_BODY(j) { store_bytes(group + j * 16, values[j]); });
    int8_t* q = reinterpret_cast<int8_t*>(group);
    for (uint32_t crowded = crowded_fours(q) | crowded_fours(q + 32) << 8; crowded; crowded &= crowded - 1) {
      const int i = __builtin_ctz(crowded);
      int8_t rest[4];
      for (int j = 0; j < 4; j++) {
        const int8_t half = int8_t(q[4 * i + j] >> 1);
        rest[j] = int8_t(q[4 * i + j] - half);
        q[4 * i + j] = half;
      }
      list.add(rest, exponent, g * (kGroup / 4) + i);
    }
    const int32_t* limits = m.lane_limits + g * (kGroup / kLaneInputs);
    for (uint32_t over = long_lanes(q, limits); over; over &= over - 1) {
      const int i = __builtin_ctz(over), block = i / 2;
      shorten_lane(q + kBlock * block, i % 2, limits[i], exponent, g * (kGroup / 4) + 4 * block, list);
    }
    put_factor(group + kPairsFactor, int16_t(1 << exponent));
    put_starts(group + kPairsStart, q);
  }
};

}  // namespace
}  // namespace nanogpt
