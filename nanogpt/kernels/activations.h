// How quantized activations lie in memory: what rows.h writes and the products (dot.h) read.
#pragma once

#include "layout.h"
#include "simd.h"

namespace nanogpt {
namespace {

// A row of a matrix's input. Groups of 64 have an exponent e: a value is q * 2^e, q in -93 .. 93, e in 0 .. 7. With 127
// instead of 93 no text's loss was smaller, and AVX2 had to set more than ten times as many aside (activations_avx2.h).
constexpr int kMostQ = 93;
enum class ActFormat {
  kBytes,      // q
  kShorts,     // q << e as int16
  kPairs,      // q as AVX2 multiplies them: activations_avx2.h
  kTiles,      // q << e in tiles of AMX: 16 rows x 64 inputs, of each group one with the high and one with the low bytes
  kByteTiles,  // q in tiles of AMX, each followed by one that holds a TileInfo for each row
};
constexpr int kTileRows = 16;
constexpr size_t kTileBytes = kTileRows * kGroup;

// Where row r begins. A tile format's blocks of 16 rows lie as far from each other as 16 rows of another do.
NG_INLINE uint8_t* row_at(uint8_t* act, size_t stride, ActFormat format, int r) {
  const bool tiles = format == ActFormat::kTiles || format == ActFormat::kByteTiles;
  return tiles ? act + r / kTileRows * kTileRows * stride + r % kTileRows * kGroup : act + r * stride;
}
struct TileInfo {
  float power;    // 2^e
  int32_t eight;  // 8 times the sum of q
};

// Bytes and shorts: 2 * k_pad bytes for the values, then this for every group.
struct GroupInfo {
  int32_t exponent;
  int32_t start;  // what a sum of products with int4's w + 8 begins with: -8 times the sum of q
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
// Where a row of 15-bit values lies: groups of 64 at a distance, as two planes where bytes are multiplied.
struct Row15 {
  uint8_t* at;
  size_t group;
  int plane;
};
// Row r of a buffer, of n_pad values, or in tiles of AMX as a matrix's input is.
NG_INLINE Row15 row_15(uint8_t* act, int r, size_t stride, int n_pad, bool tiles) {
  return tiles ? Row15{act + r * kGroup, 2 * kTileBytes, int(kTileBytes)} : Row15{act + r * stride, kGroup, n_pad};
}
NG_INLINE void put(const Row15& row, int i, const I32& a) {
#if defined(NANOGPT_AMX)
  if (row.group != kGroup) return put_planes(row.at + i / kGroup * row.group, row.plane, i % kGroup, a);
#endif
  if (kBytes)
    put_planes(row.at, row.plane, i, a);
  else
    store_shorts(row.at + 2 * i, a);
}

// Writes the groups of a matrix's input to `row` in order, in any format but pairs.
struct PlainRow {
  uint8_t* row;
  int n_pad;
  ActFormat format;
  uint32_t sum_of_all = 0;
  I32 lanes = splat(int32_t(0));
  PlainRow(uint8_t* to, const Matrix& m, ActFormat as) : row(to), n_pad(m.k_pad), format(as) {}

  NG_INLINE void group(int g, int exponent, const I32 (&q)[4]) {
    I32 total = splat(int32_t(0));
    each<4>(NG_BODY(j) {
      const int i = g * kGroup + j * 16;
      total = total + q[j];
      if (format == ActFormat::kTiles)
        put_planes(row + 2 * kTileBytes * g, kTileBytes, j * 16, shift_left(q[j], exponent));
      else if (format == ActFormat::kByteTiles)
        store_bytes(row + 2 * kTileBytes * g + j * 16, q[j]);
      else if (format == ActFormat::kBytes)
        store_bytes(row + i, q[j]);
      else
        store_shorts(row + 2 * i, shift_left(q[j], exponent));
    });
    if (format == ActFormat::kTiles) {
      lanes = lanes + shift_left(total, exponent);
      return;
    }
    const int32_t all = sum(total);
    if (format == ActFormat::kByteTiles) {
      const TileInfo tile{float(1 << exponent), 8 * all};
      std::memcpy(row + 2 * kTileBytes * g + kTileBytes, &tile, sizeof tile);
    } else {
      const GroupInfo info{exponent, -8 * all};
      std::memcpy(row + 2 * size_t(n_pad) + g * sizeof info, &info, sizeof info);
    }
    sum_of_all += uint32_t(all) << exponent;
  }
  // The sum of those activations whose products hold 128 times them too much.
  NG_INLINE uint32_t finish() { return sum_of_all + uint32_t(sum(lanes)); }
};

}  // namespace
}  // namespace nanogpt
