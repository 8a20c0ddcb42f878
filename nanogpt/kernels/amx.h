// The matrix product on AMX tiles, for batches of several rows (a single row is bound by memory and goes by VNNI).
//
// A tile of weights is 16 groups of four inputs x 16 columns: 1 KB of a panel as it lies in memory. A tile of activations
// is 16 rows x 64 inputs of one plane (dot.h: a = 256 high + low). Eight tiles: two panels x {high, low} sums, two of
// weights, two of activations. Each pair of loads feeds two products, and sums leave the tiles once a row block.
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
constexpr int kTileRows = 16;

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

// Calls done(sums, row, count, panel, panels) for blocks of up to 16 rows x 1 or 2 panels; `sums` has 32 columns.
// Reads activations of whole blocks of 16 rows: the buffer goes on past the last row.
template <class Done>
NG_INLINE void amx_matmul(const Matrix& m, const uint8_t* a, size_t a_stride, const int32_t* offsets, int rows,
                          int first, int last, const Done& done) {
  alignas(64) int32_t high[2][kTileRows * kLanes], low[2][kTileRows * kLanes], sums[kTileRows * 2 * kLanes];
  const int steps = m.k_pad / kDepth;
  for (int p = first; p < last; p += 2) {
    const int panels = last - p < 2 ? 1 : 2;
    const uint8_t* w0 = m.data + size_t(p) * m.panel_bytes;
    const uint8_t* w1 = panels == 2 ? w0 + m.panel_bytes : w0;
    for (int r = 0; r < rows; r += kTileRows) {
      const uint8_t* x = a + r * a_stride;
      NG_TILE_ZERO(0);
      NG_TILE_ZERO(1);
      NG_TILE_ZERO(2);
      NG_TILE_ZERO(3);
      for (int k = 0; k < steps; k++) {
        NG_TILE_LOAD(4, w0 + size_t(1024) * k, 64);
        NG_TILE_LOAD(6, x + size_t(64) * k, a_stride);
        NG_TILE_LOAD(7, x + m.k_pad + size_t(64) * k, a_stride);
        NG_TILE_DOT(0, 6, 4);
        NG_TILE_DOT(1, 7, 4);
        NG_TILE_LOAD(5, w1 + size_t(1024) * k, 64);
        NG_TILE_DOT(2, 6, 5);
        NG_TILE_DOT(3, 7, 5);
      }
      NG_TILE_STORE(0, high[0], 64);
      NG_TILE_STORE(1, low[0], 64);
      NG_TILE_STORE(2, high[1], 64);
      NG_TILE_STORE(3, low[1], 64);
      const int count = rows - r < kTileRows ? rows - r : kTileRows;
      for (int i = 0; i < count; i++)
        for (int half = 0; half < panels; half++)
          store(sums + (2 * i + half) * kLanes, shift_left(load(high[half] + i * kLanes), 8) +
                                                    load(low[half] + i * kLanes) - splat(offsets[r + i]));
      done(sums, r, count, p, panels);
    }
  }
}

}  // namespace
}  // namespace nanogpt
