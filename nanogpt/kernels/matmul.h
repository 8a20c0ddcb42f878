// Products of a batch with a matrix: rows are prepared, columns are divided among the threads.
#pragma once

#include "elementwise.h"
#include "kv.h"
#include "rows.h"
#include "step.h"
#if defined(NANOGPT_AMX)
#include "amx.h"
#endif

namespace nanogpt {
namespace {

constexpr size_t kBlockBytes = 393216;

// What a matrix product takes: rows of quantized (or float) activations with one scale a row.
struct Act {
  const uint8_t* data;
  size_t stride;
  const float* scale;
  const int32_t* offset;  // 128 times the row's sum of quantized activations (dot.h)
  ActFormat format;
};

// Chunks of the phase until none is left, then the next phase.
template <class Body>
NG_INLINE void phase(const Step& s, Cursor& cursor, int num_chunks, const Body& body) {
  for (int chunk; (chunk = s.team->take(cursor, num_chunks)) >= 0;) body(chunk);
  s.team->finish(cursor, num_chunks);
}

// A matrix's input, rows [first, last): `make(row, floats)` gives one row as floats (written to `floats`, or its own).
template <class Make>
NG_INLINE void prepare(const Matrix& m, int first, int last, ActFormat format, uint8_t* act, size_t stride, float* scale,
                       int32_t* offset, float* floats, const Make& make) {
  for (int r = first; r < last; r++) {
    uint8_t* to = row_at(act, stride, format, r);
    if (m.kind == Kind::kF32) {
      const float* x = make(r, reinterpret_cast<float*>(to));
      if (x != reinterpret_cast<float*>(to)) std::memcpy(to, x, sizeof(float) * round_up(m.k, 16));
      scale[r] = 1.0f;
    } else {
      scale[r] = quantize_shared(make(r, floats), m, format, to, offset + r);
    }
  }
}

enum class Then { kStore, kAdd, kGeluTanh, kGeluErf };

NG_INLINE void put_output(const F32& y, float* to, Then then) {
  if (then == Then::kStore) store(to, y);
  if (then == Then::kAdd) store(to, load(to) + y);
  if (then == Then::kGeluTanh) store(to, gelu_tanh(y));
  if (then == Then::kGeluErf) store(to, gelu_erf(y));
}

// What follows a product, for R rows and `width` columns of int32 (or float) sums.
NG_INLINE void finish(const Matrix& m, const int32_t* sums, int ld, int rows, int col, int width, const float* scale,
                      float* out, size_t ldo, Then then) {
  for (int c = 0; c < width; c += 16) {
    const F32 bias = load(m.bias + col + c);
    const F32 w_scale = m.kind == Kind::kI8 ? load(m.scale + col + c) : splat(1.0f);
    for (int r = 0; r < rows; r++) {
      const int32_t* from = sums + r * ld + c;
      const F32 s = m.kind == Kind::kI8 ? to_float(load(from)) : from_bits(load(from));
      put_output(fma(s, m.kind == Kind::kF32 ? splat(1.0f) : w_scale * splat(scale[r]), bias),
                 out + r * ldo + col + c, then);
    }
  }
}

#if defined(NANOGPT_AMX)
// The same for rows i0 .. i1 of a block of int8 sums in tiles; `out`, `scale` and `offset` are those of row 0.
NG_INLINE void finish_tiles(const Matrix& m, const TileSums& sums, const TileBlock& block, int i0, int i1,
                            const Act& act, float* out, size_t ldo, Then then) {
  for (int half = 0; half < block.panels; half++) {
    const int col = (block.panel + half) * kLanes;
    const F32 bias = load(m.bias + col), w_scale = load(m.scale + col);
    for (int i = i0; i < i1; i++) {
      const int r = block.r + i;
      const F32 s = to_float(joined(sums, half, i, act.offset[r]));
      put_output(fma(s, w_scale * splat(act.scale[r]), bias), out + r * ldo + col, then);
    }
  }
}
#endif

// What group g of `groups` groups of rows fetches beside its products with inputs [g0, g0 + n), in groups of 64 of `depth`: its
// part of the next panels, of which `lines` are read for 64 inputs, or K and V.
NG_INLINE Ahead ahead_of(const uint8_t* next, int lines, int depth, int g0, int n, int g, int groups, Upcoming& upcoming) {
  const int sharers = upcoming.any() ? Upcoming::num_fetching_weights(groups) : groups;
  const int share = (lines + sharers - 1) / sharers;
  if (g * share >= lines) return upcoming.take(n);
  return {next + (size_t(g) * depth + g0) * share * 64, share};
}

// `rows` (1 .. kMost) x P panels to sums.
template <int P, int kMost = kMaxRows>
NG_INLINE void dot_rows(int rows, const Matrix& m, const uint8_t* a, size_t a_stride, const int32_t* offsets,
                        int panel, int32_t* out, int ld, Ahead ahead) {
  const uint8_t* w = m.data + size_t(panel) * m.panel_bytes;
  const GroupInfo* info = reinterpret_cast<const GroupInfo*>(a + 2 * size_t(m.k_pad));
  with_constant<kMost>(rows, NG_BODY(R) {
    if (m.kind == Kind::kI8) {
      dot_shared<R, P>(a, a_stride, info, w, m.panel_bytes, m.k_pad / kGroup, offsets, out, ld, ahead);
    } else if (m.kind == Kind::kF32) {
      dot_f32<R, P>((const float*)a, a_stride / 4, (const float*)w, m.panel_bytes / 4, m.k, (float*)out, ld, false);
    } else if constexpr (P == 1) {
      dot_i4<R>(a, a_stride, w, m.k_pad / kGroup, (float*)out, ld, ahead);
    }
  });
}

#if defined(__AVX512VNNI__)
// matmul_part of an int4 matrix for many rows: a few groups of a pair of panels are unpacked to bytes, which stay in the
// L1 cache for all rows.
inline void matmul_unpacked(const Matrix& m, const Act& act, int r0, int n, int first, int last, float* out, size_t ldo,
                            Then then, Upcoming& upcoming) {
  constexpr int kUnpacked = 6, kRowsAtOnce = 16 * kMaxRows, kWidth = 2 * kLanes;
  alignas(64) uint8_t bytes[2][kUnpacked * kGroup * kLanes];
  alignas(64) float totals[kRowsAtOnce * kWidth];
  const int depth = m.k_pad / kGroup, num_groups = (n + kMaxRows - 1) / kMaxRows;
  for (int p = first, width; p < last; p += width) {
    width = last - p >= 2 ? 2 : 1;
    const int lines = int(m.panel_bytes / depth + 63) / 64 * width;
    const uint8_t* next = m.data + size_t(p + width) * m.panel_bytes;
    for (int begin = 0; begin < n; begin += kRowsAtOnce) {
      const int rows = imin(kRowsAtOnce, n - begin), groups = (rows + kMaxRows - 1) / kMaxRows;
      for (int g0 = 0; g0 < depth; g0 += kUnpacked) {
        const int num = imin(kUnpacked, depth - g0);
        for (int j = 0; j < width; j++) unpack_i4(m.data + size_t(p + j) * m.panel_bytes, g0, num, bytes[j]);
        for (int g = 0; g < groups; g++) {
          const int r = rows * g / groups, count = rows * (g + 1) / groups - r;
          const uint8_t* a = act.data + (r0 + begin + r) * act.stride;
          const Ahead ahead = ahead_of(next, lines, depth, g0, num, begin / kMaxRows + g, num_groups, upcoming);
          const GroupInfo* info = reinterpret_cast<const GroupInfo*>(a + 2 * size_t(m.k_pad)) + g0;
          const uint8_t* scales = m.data + size_t(p) * m.panel_bytes + size_t(g0) * kGroupBytes + 512;
          with_constant<2>(width, NG_BODY(P) {
            with_constant<kMaxRows>(count, NG_BODY(R) {
              dot_unpacked<R, P>(a + g0 * kGroup, act.stride, info, bytes[0], sizeof bytes[0], scales, m.panel_bytes, num,
                                 totals + r * kWidth, kWidth, g0 > 0, ahead);
            });
          });
        }
      }
      finish(m, reinterpret_cast<const int32_t*>(totals), kWidth, rows, p * kLanes, width * kLanes,
             act.scale + r0 + begin, out + (r0 + begin) * ldo, ldo, then);
    }
  }
}
#endif

// out = act x m for rows [r0, r0 + n) and panels [first, last).
inline void matmul_part(const Matrix& m, const Act& act, int r0, int n, int first, int last, float* out, size_t ldo,
                        Then then, Upcoming& upcoming) {
#if defined(NANOGPT_AMX)
  const uint8_t* tiles = act.data + r0 * act.stride;
  if (act.format == ActFormat::kTiles) {
    const Act part{tiles, act.stride, act.scale + r0, act.offset + r0, act.format};
    amx_matmul(m, tiles, act.stride, n, first, last, [&](const TileSums& sums, const TileBlock& block, int i0, int i1) {
      finish_tiles(m, sums, block, i0, imin(i1, n - block.r), part, out + r0 * ldo, ldo, then);
    });
    return;
  }
  if (act.format == ActFormat::kByteTiles) {
    amx_matmul_i4(m, tiles, act.stride, n, first, last, [&](const float* totals, int r, int panel) {
      finish(m, reinterpret_cast<const int32_t*>(totals), kLanes, imin(kTileRows, n - r), panel * kLanes, kLanes,
             act.scale + r0 + r, out + (r0 + r) * ldo, ldo, then);
    });
    return;
  }
#endif
#if defined(__AVX512VNNI__)
  if (m.kind == Kind::kI4 && n >= kUnpackFrom) return matmul_unpacked(m, act, r0, n, first, last, out, ldo, then, upcoming);
#endif
  alignas(64) int32_t sums[kMaxRows * 16 * 4];
  const int groups = (n + kMaxRows - 1) / kMaxRows;
  for (int p = first; p < last;) {
    int width = 1;
    if (kPanelsAtOnce == 4 && m.kind != Kind::kI4) width = n <= 3 && last - p >= 4 ? 4 : last - p >= 2 ? 2 : 1;
    for (int g = 0; g < groups; g++) {
      const int r = r0 + n * g / groups, count = r0 + n * (g + 1) / groups - r;
      const uint8_t* a = act.data + r * act.stride;
      const int depth = m.k_pad / kGroup, lines = n < kFetchFrom ? 0 : int(m.panel_bytes / depth + 63) / 64 * width;
      const Ahead ahead =
          ahead_of(m.data + size_t(p + width) * m.panel_bytes, lines, depth, 0, depth, g, groups, upcoming);
      // Where the output is larger than a cache, its lines would hold up the stores and then, through them, everything.
      for (int i = 0; i < count; i++)
        for (int c = 0; c < width; c++) prefetch_near(out + (r + i) * ldo + (p + c) * kLanes);
      if constexpr (kPanelsAtOnce == 4) {
        if (width == 4) dot_rows<4, 3>(count, m, a, act.stride, act.offset + r, p, sums, 64, ahead);
        if (width == 2) dot_rows<2>(count, m, a, act.stride, act.offset + r, p, sums, 64, ahead);
      }
      if (width == 1) dot_rows<1>(count, m, a, act.stride, act.offset + r, p, sums, 64, ahead);
      finish(m, sums, 64, count, p * kLanes, width * kLanes, act.scale + r, out + r * ldo, ldo, then);
    }
    p += width;
  }
}

// out[rows, n] = (the rows that `make` gives) x m. Small batches are prepared by every thread for itself, which is
// cheaper than a phase; larger ones together.
template <class Make>
NG_INLINE void matmul(const Step& s, Cursor& cursor, const Matrix& m, int rows, float* out, size_t ldo, Then then,
                      Upcoming& upcoming, const Make& make) {
  Scratch& scratch = s.scratch[cursor.thread];
  const bool own = rows <= kOwnRows;
  float* scale = own ? scratch.act_scale : s.act_scale;
  int32_t* offset = own ? scratch.act_offset : s.act_offset;
  ActFormat format = m.kind == Kind::kI4 ? kInt4Input : kInt8Input;
  int unit = 1;  // rows that cannot be divided
#if defined(NANOGPT_AMX)
  if (rows >= kAmxRows && m.kind != Kind::kF32) {
    format = m.kind == Kind::kI8 ? ActFormat::kTiles : ActFormat::kByteTiles;
    unit = kTileRows;
  }
#endif
  const Act act{own ? scratch.act : s.act, s.act_stride, scale, offset, format};
  if (!own) {
    const int per_chunk = imax(1, rows / (4 * s.team->size()));
    phase(s, cursor, (rows + per_chunk - 1) / per_chunk, [&](int chunk) {
      prepare(m, chunk * per_chunk, imin(rows, (chunk + 1) * per_chunk), format, s.act, s.act_stride, scale, offset,
              scratch.row, make);
    });
  }
  // Rows go in blocks whose activations stay in the L2 cache while the weights pass by.
  int block = imin(rows, int(round_up<size_t>(1 + kBlockBytes / (2 * size_t(m.k_pad)), kMaxRows)));
#if defined(NANOGPT_AMX)
  if (unit > 1) block = imin(block, kAmxMostRows - kTileRows);  // a block may get a unit more than its share
#endif
  const int blocks = (rows + block - 1) / block, units = (rows + unit - 1) / unit, panels = m.num_panels();
  // Chunks of whole groups of panels: fine enough for a thread that falls behind to be helped, and even.
  const int strips = imin((panels + 3) / 4, imax(1, (rows > 8 ? 8 : 4) * s.team->size() / blocks));
  const auto strip_begin = [&](int i) { return i == strips ? panels : panels * i / strips / 4 * 4; };
  bool prepared = !own;
  phase(s, cursor, blocks * strips, [&](int chunk) {
    if (!prepared) prepare(m, 0, rows, format, scratch.act, s.act_stride, scale, offset, scratch.row, make);
    prepared = true;
    const int r0 = units * (chunk / strips) / blocks * unit;
    const int r1 = imin(rows, units * (chunk / strips + 1) / blocks * unit);
    matmul_part(m, act, r0, r1 - r0, strip_begin(chunk % strips), strip_begin(chunk % strips + 1), out, ldo, then, upcoming);
  });
}

// The embedding of one token: row `token` of a packed matrix, as floats.
inline void embedding_row(const Matrix& m, int token, float* out) {
  const int c = token % kLanes;
  const uint8_t* panel = m.data + size_t(token / kLanes) * m.panel_bytes;
  if (m.kind == Kind::kF32) {
    for (int k = 0; k < m.k; k++) std::memcpy(out + k, panel + (size_t(k) * kLanes + c) * 4, 4);
  } else if (m.kind == Kind::kI8) {
    const float scale = m.scale[token];
    for (int k = 0; k < m.k; k++) out[k] = float(int(panel[size_t(k / 4) * 64 + c * 4 + k % 4]) - 128) * scale;
  } else {
    for (int k = 0; k < m.k; k++) {
      const uint8_t* group = panel + size_t(k / kGroup) * kGroupBytes;
      const int i = k % kGroup;
      const uint8_t byte = group[(i % 32) / 4 * 64 + c * 4 + i % 4];
      uint16_t half;
      std::memcpy(&half, group + 512 + 2 * c, 2);
      const uint32_t wide = uint32_t(half) << 16;
      float scale;
      std::memcpy(&scale, &wide, 4);
      out[k] = float(int(i < 32 ? byte & 15 : byte >> 4) - 8) * scale;
    }
  }
}

}  // namespace
}  // namespace nanogpt
