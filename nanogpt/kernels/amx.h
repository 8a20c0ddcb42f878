// The matrix product on AMX tiles, for batches of several rows (a single row is bound by memory and goes by VNNI).
//
// A tile of weights is 16 groups of four inputs x 16 columns: 1 KB of a panel as it lies in memory, or of an int4 panel
// as it is unpacked. A tile of activations is 16 rows x 64 inputs.
//
// int8: two tiles of activations, a = 256 high + low (activations.h). Eight tiles: two panels x {high, low} sums, two of
// weights, two of activations. Each pair of loads feeds two products, and sums leave the tiles once a block of rows.
// int4: every group of 64 inputs has its own scale, so that its sums leave the tiles and are joined in vectors.
#pragma once

#include "dot.h"
#if defined(NANOGPT_EMULATED_AMX)
#include "amx_emulated.h"
#else
#define NG_TILE_LOAD(tile, base, stride) _tile_loadd(tile, base, stride)
#define NG_TILE_STORE(tile, base, stride) _tile_stored(tile, base, stride)
#define NG_TILE_ZERO(tile) _tile_zero(tile)
#define NG_TILE_DOT(c, a, b) _tile_dpbsud(c, a, b)
#endif

namespace nanogpt {
namespace {

constexpr int kAmxRows = 5;
constexpr int kAmxMostRows = 256;  // rows whose activations stay in the L2 cache while the weights pass by

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tiles belong to a thread and to the time of one job.
struct AmxTiles {
  AmxTiles() {
#if !defined(NANOGPT_EMULATED_AMX)
    const TileConfig config;
    // Not the intrinsic: GCC 12's does not say that it reads all 64 bytes, and their stores can come after it.
    asm volatile("ldtilecfg %0" : : "m"(config));
#endif
  }
  ~AmxTiles() {
#if !defined(NANOGPT_EMULATED_AMX)
    _tile_release();
#endif
  }
};

// A block of products: rows r .. r + 16, one panel or two. `panels` 0: there is none.
struct TileBlock {
  int r = 0, panel = 0, panels = 0;
};
struct TileSums {
  alignas(64) int32_t high[2][kTileRows * kLanes], low[2][kTileRows * kLanes];
};

NG_INLINE void store_tiles(TileSums& sums) {
  NG_TILE_STORE(0, sums.high[0], 64);
  NG_TILE_STORE(1, sums.low[0], 64);
  NG_TILE_STORE(2, sums.high[1], 64);
  NG_TILE_STORE(3, sums.low[1], 64);
}

// Sums of 16 rows with two panels, left in the tiles. A step is 64 inputs; each_step(k) is called between.
template <class EachStep>
NG_INLINE void amx_products(const uint8_t* w0, const uint8_t* w1, size_t w_step, const uint8_t* x, int steps,
                            const EachStep& each_step) {
  NG_TILE_ZERO(0);
  NG_TILE_ZERO(1);
  NG_TILE_ZERO(2);
  NG_TILE_ZERO(3);
  for (int k = 0; k < steps; k++, x += 2 * kTileBytes, w0 += w_step, w1 += w_step) {
    NG_TILE_LOAD(4, w0, 64);
    NG_TILE_LOAD(6, x, 64);
    NG_TILE_LOAD(7, x + kTileBytes, 64);
    NG_TILE_DOT(0, 6, 4);
    NG_TILE_DOT(1, 7, 4);
    NG_TILE_LOAD(5, w1, 64);
    NG_TILE_DOT(2, 6, 5);
    NG_TILE_DOT(3, 7, 5);
    each_step(k);
  }
}

NG_INLINE I32 joined(const TileSums& sums, int half, int i, int32_t offset) {
  return shift_left(load(sums.high[half] + i * kLanes), 8) + load(sums.low[half] + i * kLanes) - splat(offset);
}

// Attention's products, 15 bits in tiles with K or V. The sums of `rows` rows go to out(p), of `ld` columns, for each of
// the panels, whose tiles lie at panel(p) and w_step further for every 64 inputs.
template <class Panel, class Out>
NG_INLINE void amx_dot_15(const uint8_t* x, int steps, const int32_t* offsets, int rows, int panels, const Panel& panel,
                          size_t w_step, const Out& out, int ld) {
  TileSums sums[2];
  int turn = 0;
  const auto join = [&](int p, int i0, int i1) {
    for (int half = 0; half < 2 && p >= 0 && p + half < panels; half++)
      for (int i = i0; i < i1 && i < rows; i++)
        store(out(p + half) + size_t(i) * ld, joined(sums[turn ^ 1], half, i, offsets[i]));
  };
  for (int p = 0; p < panels; p += 2, turn ^= 1) {
    amx_products(panel(p), panel(p + 1 < panels ? p + 1 : p), w_step, x, steps,
                 [&](int k) { join(p - 2, kTileRows * k / steps, kTileRows * (k + 1) / steps); });
    store_tiles(sums[turn]);
  }
  join((panels - 1) / 2 * 2, 0, kTileRows);
}

// int8. Calls done(sums, block, i0, i1) for rows i0 .. i1 of each block, when the next one's products are under way: the
// tiles and the vector units work at the same time. `a` is in tiles.
template <class Done>
NG_INLINE void amx_matmul(const Matrix& m, const uint8_t* a, size_t a_stride, int rows, int first, int last,
                          const Done& done) {
  TileSums sums[2];
  TileBlock before;
  int turn = 0;
  const int steps = m.k_pad / kDepth, blocks = (rows + kTileRows - 1) / kTileRows;
  // Each block fetches its part of the next two panels, which are two lines of 16 for each step of a block.
  constexpr int kLines = 2 * kTileRows;
  const int lines = (kLines + blocks - 1) / blocks;
  for (int p = first; p < last; p += 2) {
    const int panels = last - p < 2 ? 1 : 2;
    const uint8_t* w0 = m.data + size_t(p) * m.panel_bytes;
    const uint8_t* w1 = panels == 2 ? w0 + m.panel_bytes : w0;
    for (int b = 0; b < blocks; b++) {
      const uint8_t* x = a + b * kTileRows * a_stride;
      Ahead ahead{w1 + m.panel_bytes + size_t(b) * lines * 64 * steps, b * lines < kLines ? lines : 0};
      amx_products(w0, w1, 1024, x, steps, [&](int k) {
        for (int i = 0; i < ahead.lines; i++, ahead.next += 64) prefetch(ahead.next);
        done(sums[turn ^ 1], before, kTileRows * k / steps, kTileRows * (k + 1) / steps);
      });
      store_tiles(sums[turn]);
      before = {b * kTileRows, p, panels};
      turn ^= 1;
    }
  }
  done(sums[turn ^ 1], before, 0, kTileRows);
}

// Products of 16 rows with up to four groups, a tile each, to sums.
NG_INLINE void amx_four_groups(const uint8_t* x, const uint8_t* tiles, int n, int32_t (*sums)[kTileRows * kLanes]) {
#define NG_ONE_GROUP(j, acc, x_tile, w_tile)                 \
  if (j < n) {                                               \
    NG_TILE_ZERO(acc);                                       \
    NG_TILE_LOAD(x_tile, x + 2 * kTileBytes * j, 64);        \
    NG_TILE_LOAD(w_tile, tiles + 1024 * j, 64);              \
    NG_TILE_DOT(acc, x_tile, w_tile);                        \
    NG_TILE_STORE(acc, sums[j], 64);                         \
  }
  NG_ONE_GROUP(0, 0, 4, 6)
  NG_ONE_GROUP(1, 1, 5, 7)
  NG_ONE_GROUP(2, 2, 4, 6)
  NG_ONE_GROUP(3, 3, 5, 7)
#undef NG_ONE_GROUP
}

// What dot_i4 does with a group's sums, for R rows and n groups.
template <int R>
NG_INLINE void add_groups(const int32_t (*sums)[kTileRows * kLanes], const uint8_t* x, const uint8_t* w, int n,
                          F32 (&total)[R]) {
  for (int j = 0; j < n; j++, x += 2 * kTileBytes, w += kGroupBytes) {
    const F32 scale = load_bf16(w + 512);
    each<R>(NG_BODY(r) {
      TileInfo info;
      std::memcpy(&info, x + kTileBytes + r * kGroup, sizeof info);
      // 2^e times the scale is the same as the sum shifted by e: neither rounds.
      const F32 s = to_float(load(sums[j] + r * kLanes) - splat(info.eight));
      total[r] = fma(s, scale * splat(info.power), total[r]);
    });
  }
}

// R rows of a block with groups [g0, g0 + n): the tiles are one set of groups ahead of the vector units.
template <int R>
NG_INLINE void amx_block_i4(const uint8_t* x, const uint8_t* w, const uint8_t* tiles, int n, bool add, float* totals) {
  alignas(64) int32_t sums[2][4][kTileRows * kLanes];
  F32 total[R];
  each<R>(NG_BODY(r) { total[r] = add ? load(totals + r * kLanes) : splat(0.0f); });
  amx_four_groups(x, tiles, n, sums[0]);
  for (int g = 0, turn = 0; g < n; g += 4, turn ^= 1) {
    const int next = g + 4;
    if (next < n) amx_four_groups(x + 2 * kTileBytes * next, tiles + 1024 * next, n - next, sums[turn ^ 1]);
    add_groups<R>(sums[turn], x + 2 * kTileBytes * g, w + kGroupBytes * g, n - g < 4 ? n - g : 4, total);
  }
  each<R>(NG_BODY(r) { store(totals + r * kLanes, total[r]); });
}

// int4, for up to kAmxMostRows rows in tiles of bytes. Calls done(totals, r, panel) with 16 x 16 floats for each block.
template <class Done>
NG_INLINE void amx_matmul_i4(const Matrix& m, const uint8_t* a, size_t a_stride, int rows, int first, int last,
                             const Done& done) {
  constexpr int kUnpacked = 16;  // groups: 16 KB, which stay in the L1 cache for all rows
  alignas(64) uint8_t tiles[kUnpacked * 1024];
  alignas(64) float totals[kAmxMostRows / kTileRows][kTileRows * kLanes];
  const int groups = m.k_pad / kGroup;
  for (int p = first; p < last; p++) {
    const uint8_t* panel = m.data + size_t(p) * m.panel_bytes;
    for (int g0 = 0; g0 < groups; g0 += kUnpacked) {
      const int n = groups - g0 < kUnpacked ? groups - g0 : kUnpacked;
      unpack_i4(panel, g0, n, tiles);
      for (int r = 0; r < rows; r += kTileRows) {
        const uint8_t *x = a + r * a_stride + 2 * kTileBytes * g0, *w = panel + kGroupBytes * g0;
        if (rows - r > 8)
          amx_block_i4<16>(x, w, tiles, n, g0 > 0, totals[r / kTileRows]);
        else
          amx_block_i4<8>(x, w, tiles, n, g0 > 0, totals[r / kTileRows]);
      }
    }
    for (int r = 0; r < rows; r += kTileRows) done(totals[r / kTileRows], r, p);
  }
}

}  // namespace
}  // namespace nanogpt
