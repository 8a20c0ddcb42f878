// A whole model step on one thread of the team: embedding, layers, attention, head. Compiled once an instruction set.
//
// Threads divide a matrix by its output columns and attention by sequences, heads and rows. Nothing that a thread
// computes depends on that division or on the other rows of the batch: integer sums are exact, and float sums run in a
// fixed order inside one row. So the bits of a row are the same in any company.
#pragma once

#include "dot.h"
#include "elementwise.h"
#include "step.h"
#if defined(NANOGPT_AMX)
#include "amx.h"
#endif

namespace nanogpt {
namespace {

NG_INLINE int imin(int a, int b) { return a < b ? a : b; }
NG_INLINE int imax(int a, int b) { return a > b ? a : b; }

constexpr size_t kBlockBytes = 393216;

enum class ActFormat { kBytes, kShorts, kPlanes };  // what a matrix product takes: dot.h; planes are AMX's

// What a matrix product takes: rows of quantized (or float) activations with one scale a row.
struct Act {
  const uint8_t* data;
  size_t stride;
  const float* scale;
  const int32_t* offset;  // 128 times the row's sum of quantized activations (dot.h)
  ActFormat format;
};

// ---- rows -----------------------------------------------------------------------------------------------------------

NG_INLINE float largest_size(const float* x, int n) {
  F32 largest = splat(0.0f);
  for (int i = 0; i < n; i += 16) largest = max(abs(load(x + i)), largest);
  return max_lane(largest);
}
constexpr float kTiny = 1e-30f;  // below, 1 / x would overflow: such a row is taken for zero

// The floats x[0, n) as 15-bit integers, zeros up to n_pad. Returns their unit; `offset` see dot.h.
inline float quantize_15(const float* x, int n, int n_pad, int limit, uint8_t* out, int32_t* offset) {
  const float top = largest_size(x, n);
  const F32 inverse = splat(top > kTiny ? float(limit) / top : 0.0f);
  I32 total = splat(int32_t(0));
  int i = 0;
  for (; i < n; i += 16) {
    const I32 a = round_to_int(load(x + i) * inverse);
    total = total + a;
    put(out, n_pad, i, a);
  }
  for (; i < n_pad; i += 16) put(out, n_pad, i, splat(int32_t(0)));
  *offset = int32_t(uint32_t(sum(total)) * 128u);
  return top > kTiny ? top / float(limit) : 0.0f;
}

// The same for a matrix's input: in every group of 64 the integers are rounded to eight bits and a common exponent.
inline float quantize_shared(const float* x, int n, int n_pad, int limit, ActFormat format, uint8_t* out,
                             int32_t* offset) {
  const float top = largest_size(x, n);
  const F32 inverse = splat(top > kTiny ? float(limit) / top : 0.0f);
  uint32_t row_sum = 0;
  for (int g = 0; g < n_pad / kGroup; g++) {
    I32 a[4], size = splat(int32_t(0));
    each<4>(NG_BODY(j) {
      const int i = g * kGroup + j * 16;
      a[j] = i < n ? round_to_int(load(x + i) * inverse) : splat(int32_t(0));
      size = size | abs(a[j]);
    });
    const uint32_t bits_used = 32 - uint32_t(__builtin_clz(any_bit(size) | 1));
    const int e = bits_used > 7 ? int(bits_used) - 7 : 0;
    const I32 half = splat(int32_t(1 << e >> 1)), most = splat(int32_t(127));
    I32 total = splat(int32_t(0));
    each<4>(NG_BODY(j) {
      const int i = g * kGroup + j * 16;
      I32 q = shift_right_signed(a[j] + half, e);
      q = select(less(most, q), most, q);
      total = total + q;
      if (format == ActFormat::kPlanes)
        put_planes(out, n_pad, i, shift_left(q, e));
      else if (format == ActFormat::kBytes)
        store_bytes(out + i, q);
      else
        store_shorts(out + 2 * i, shift_left(q, e));
    });
    const GroupInfo info{e, sum(total)};
    row_sum += uint32_t(info.sum) << e;
    std::memcpy(out + 2 * size_t(n_pad) + g * sizeof info, &info, sizeof info);
  }
  *offset = int32_t(row_sum * 128u);
  return top > kTiny ? top / float(limit) : 0.0f;
}

// x must be zero past n, up to a multiple of 16.
inline void layer_norm(const float* x, int n, const float* w, const float* b, float eps, float* out) {
  F32 total = splat(0.0f);
  for (int i = 0; i < n; i += 16) total = total + load(x + i);
  const F32 mean = splat(sum(total) / float(n));
  F32 squares = splat(0.0f);
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const F32 d = load(x + i) - mean;
    squares = fma(d, d, squares);
  }
  if (i < n) {
    const F32 d = select(less(iota(), splat(int32_t(n - i))), load(x + i) - mean, splat(0.0f));
    squares = fma(d, d, squares);
  }
  const F32 inverse = splat(1.0f / __builtin_sqrtf(sum(squares) / float(n) + eps));
  for (i = 0; i < n; i += 16) store(out + i, fma((load(x + i) - mean) * inverse, load(w + i), load(b + i)));
}

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
    uint8_t* to = act + r * stride;
    if (m.kind == Kind::kF32) {
      const float* x = make(r, reinterpret_cast<float*>(to));
      if (x != reinterpret_cast<float*>(to)) std::memcpy(to, x, sizeof(float) * round_up(m.k, 16));
      scale[r] = 1.0f;
    } else {
      scale[r] = quantize_shared(make(r, floats), m.k, m.k_pad, m.act_max, format, to, offset + r);
    }
  }
}

// ---- matrices -------------------------------------------------------------------------------------------------------

enum class Then { kStore, kAdd, kGeluTanh, kGeluErf };

// What follows a product, for R rows and `width` columns of int32 (or float) sums.
NG_INLINE void finish(const Matrix& m, const int32_t* sums, int ld, int rows, int col, int width, const float* scale,
                      float* out, size_t ldo, Then then) {
  for (int c = 0; c < width; c += 16) {
    const F32 bias = load(m.bias + col + c);
    const F32 w_scale = m.kind == Kind::kI8 ? load(m.scale + col + c) : splat(1.0f);
    for (int r = 0; r < rows; r++) {
      const int32_t* from = sums + r * ld + c;
      const F32 s = m.kind == Kind::kI8 ? to_float(load(from)) : from_bits(load(from));
      F32 y = fma(s, m.kind == Kind::kF32 ? splat(1.0f) : w_scale * splat(scale[r]), bias);
      float* o = out + r * ldo + col + c;
      if (then == Then::kAdd) y = load(o) + y;
      if (then == Then::kGeluTanh) y = gelu_tanh(y);
      if (then == Then::kGeluErf) y = gelu_erf(y);
      store(o, y);
    }
  }
}

// `rows` (1 .. kMaxRows) x `panels` (1, or kPanelsAtOnce and its half) to sums, with the count of rows made a constant.
template <int P, int R = kMaxRows>
NG_INLINE void dot_rows(int rows, const Matrix& m, const uint8_t* a, size_t a_stride, const int32_t* offsets,
                        int panel, int32_t* out, int ld, Ahead ahead) {
  if constexpr (R > 0) {
    if (rows != R) return dot_rows<P, R - 1>(rows, m, a, a_stride, offsets, panel, out, ld, ahead);
    const uint8_t* w = m.data + size_t(panel) * m.panel_bytes;
    const GroupInfo* info = reinterpret_cast<const GroupInfo*>(a + 2 * size_t(m.k_pad));
    if (m.kind == Kind::kI8) {
      dot_shared<R, P>(a, a_stride, info, w, m.panel_bytes, m.k_pad / kGroup, offsets, out, ld, ahead);
    } else if (m.kind == Kind::kF32) {
      dot_f32<R, P>((const float*)a, a_stride / 4, (const float*)w, m.panel_bytes / 4, m.k, (float*)out, ld, false);
    } else if constexpr (P == 1) {
      dot_i4<R>(a, a_stride, info, w, m.k_pad / kGroup, (float*)out, ld, ahead);
    }
  }
}

// out = act x m for rows [r0, r0 + n) and panels [first, last).
inline void matmul_part(const Matrix& m, const Act& act, int r0, int n, int first, int last, float* out, size_t ldo,
                        Then then) {
#if defined(NANOGPT_AMX)
  if (act.format == ActFormat::kPlanes) {
    amx_matmul(m, act.data + r0 * act.stride, act.stride, act.offset + r0, n, first, last,
               [&](const int32_t* sums, int r, int count, int panel, int panels) {
                 finish(m, sums, 2 * kLanes, count, panel * kLanes, panels * kLanes, act.scale + r0 + r,
                        out + (r0 + r) * ldo, ldo, then);
               });
    return;
  }
#endif
  alignas(64) int32_t sums[kMaxRows * 16 * 4];
  const int groups = (n + kMaxRows - 1) / kMaxRows;
  for (int p = first; p < last;) {
    int width = 1;
    if (kPanelsAtOnce == 4 && m.kind != Kind::kI4) width = n <= 3 && last - p >= 4 ? 4 : last - p >= 2 ? 2 : 1;
    for (int g = 0; g < groups; g++) {
      const int r = r0 + n * g / groups, count = r0 + n * (g + 1) / groups - r;
      const uint8_t* a = act.data + r * act.stride;
      // Each group of rows fetches its part of the next panels.
      const int depth = m.k_pad / kGroup, all_lines = int(m.panel_bytes / depth + 63) / 64 * width;
      const int lines = n < kFetchFrom ? 0 : (all_lines + groups - 1) / groups;
      const Ahead ahead{m.data + size_t(p + width) * m.panel_bytes + size_t(g) * lines * 64 * depth, lines};
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
                      const Make& make) {
  Scratch& scratch = s.scratch[cursor.thread];
  const bool own = rows <= kOwnRows;
  float* scale = own ? scratch.act_scale : s.act_scale;
  int32_t* offset = own ? scratch.act_offset : s.act_offset;
  ActFormat format = kBytes || m.kind == Kind::kI4 ? ActFormat::kBytes : ActFormat::kShorts;
#if defined(NANOGPT_AMX)
  if (rows >= kAmxRows && m.kind == Kind::kI8) format = ActFormat::kPlanes;
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
  const int block = imin(rows, int(round_up<size_t>(1 + kBlockBytes / (2 * size_t(m.k_pad)), kMaxRows)));
  const int blocks = (rows + block - 1) / block, panels = m.num_panels();
  // About four chunks a thread, of whole groups of panels: fine enough for a thread that falls behind to be helped.
  const int width = imax(4, round_up(panels * blocks / (4 * s.team->size()) + 1, 4)), strips = (panels + width - 1) / width;
  bool prepared = !own;
  phase(s, cursor, blocks * strips, [&](int chunk) {
    if (!prepared) prepare(m, 0, rows, format, scratch.act, s.act_stride, scale, offset, scratch.row, make);
    prepared = true;
    const int r0 = rows * (chunk / strips) / blocks, r1 = rows * (chunk / strips + 1) / blocks;
    const int first = chunk % strips * width;
    matmul_part(m, act, r0, r1 - r0, first, imin(panels, first + width), out, ldo, then);
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

// ---- attention ------------------------------------------------------------------------------------------------------

NG_INLINE uint8_t* leaf_at(const Step& s, int slot, int block, int layer, int head) {
  return s.kv_base + slot * s.kv.slot_bytes + block * s.kv.block_bytes +
         size_t(layer * s.kv.n_head + head) * s.kv.leaf_bytes;
}

// K and V of one (row, head) to its leaf.
inline void write_kv(const Step& s, int layer, int row, int head) {
  const KvGeometry& kv = s.kv;
  const Span& span = s.spans[s.row_span[row]];
  const int position = s.positions[row], t = position % kLeafTokens, c = kv.d * kv.n_head;
  uint8_t* leaf = leaf_at(s, span.slot, position / kLeafTokens, layer, head);
  const float* k = s.qkv + row * s.ldqkv + c + head * kv.d;
  const float* v = k + c;
  if (kv.f32) {
    float* kt = reinterpret_cast<float*>(leaf);
    float* vt = reinterpret_cast<float*>(leaf + kv.k_bytes);
    for (int i = 0; i < kv.d; i++) kt[(t / 16 * kv.dk + i) * 16 + t % 16] = k[i];
    for (int i = 0; i < kv.d; i++) vt[(i / 16 * kLeafTokens + t) * 16 + i % 16] = v[i];
    return;
  }
  float* k_scale = reinterpret_cast<float*>(leaf + kv.k_bytes + kv.v_bytes);
  float* v_scale = k_scale + kLeafTokens;
  // Sixteen values from x + i on; a head that is no multiple of 16 is completed with zeros.
  auto sixteen = [&](const float* x, int i) {
    if (i + 16 <= kv.d) return load(x + i);
    alignas(64) float padded[16] = {};
    for (int j = 0; j < kv.d - i; j++) padded[j] = x[i + j];
    return load(padded);
  };
  auto largest = [&](const float* x) {
    F32 m = splat(0.0f);
    for (int i = 0; i < kv.d; i += 16) m = max(abs(sixteen(x, i)), m);
    return max_lane(m);
  };
  const I32 offset = splat(int32_t(128));
  uint8_t q[16];
  uint8_t* kt = leaf + size_t(t / 16) * kv.dk * 16 + t % 16 * 4;
  float top = largest(k);
  F32 inverse = splat(top > kTiny ? 127.0f / top : 0.0f);
  for (int i = 0; i < kv.d; i += 16) {
    store_bytes(q, round_to_int(sixteen(k, i) * inverse) + offset);
    for (int j = 0; j < imin(16, kv.dk - i); j += 4) std::memcpy(kt + (i + j) * 16, q + j, 4);
  }
  k_scale[t] = top > kTiny ? top / 127.0f : 0.0f;
  uint8_t* vt = leaf + kv.k_bytes + t / 4 * 64 + t % 4;
  top = largest(v);
  inverse = splat(top > kTiny ? 127.0f / top : 0.0f);
  for (int i = 0; i < kv.d; i += 16) {
    store_bytes(q, round_to_int(sixteen(v, i) * inverse) + offset);
    for (int j = 0; j < 16; j++) vt[size_t(i) * kLeafTokens + j * 4] = q[j];
  }
  v_scale[t] = top > kTiny ? top / 127.0f : 0.0f;
}

// One head of a leaf: scores' sums of R queries with its 64 tokens / the tokens' weights with its V.
template <int R = kMaxRows>
NG_INLINE void leaf_scores(int rows, const KvGeometry& kv, const uint8_t* q, size_t q_stride, int plane,
                           const int32_t* offsets, const uint8_t* leaf, int panels, int32_t* out, int ld) {
  if constexpr (R > 0) {
    if (rows != R) return leaf_scores<R - 1>(rows, kv, q, q_stride, plane, offsets, leaf, panels, out, ld);
    int p = 0;
    constexpr int kWide = kPanelsAtOnce == 4 ? (R <= 3 ? 4 : 2) : 1;
    for (; p + kWide <= panels; p += kWide) {
      const uint8_t* w = leaf + p * (kv.k_bytes / 4);
      if (kv.f32)
        dot_f32<R, kWide>((const float*)q, q_stride / 4, (const float*)w, kv.k_bytes / 16, kv.d,
                          (float*)out + 16 * p, ld, false);
      else
        dot_15<R, kWide>(q, q_stride, plane, w, kv.k_bytes / 4, kv.dk / 4, offsets, out + 16 * p, ld, false);
    }
    for (; p < panels; p++) {
      const uint8_t* w = leaf + p * (kv.k_bytes / 4);
      if (kv.f32)
        dot_f32<R, 1>((const float*)q, q_stride / 4, (const float*)w, 0, kv.d, (float*)out + 16 * p, ld, false);
      else
        dot_15<R, 1>(q, q_stride, plane, w, 0, kv.dk / 4, offsets, out + 16 * p, ld, false);
    }
  }
}
template <int R = kMaxRows>
NG_INLINE void leaf_values(int rows, const KvGeometry& kv, const uint8_t* p, size_t p_stride, int plane,
                           const int32_t* offsets, const uint8_t* leaf, int tokens, int32_t* out, int ld, bool add) {
  if constexpr (R > 0) {
    if (rows != R) return leaf_values<R - 1>(rows, kv, p, p_stride, plane, offsets, leaf, tokens, out, ld, add);
    const uint8_t* w = leaf + kv.k_bytes;
    const int kq = (tokens + 3) / 4;
    int c = 0;
    constexpr int kWide = kPanelsAtOnce == 4 ? (R <= 3 ? 4 : 2) : 1;
    const size_t stride = kv.f32 ? size_t(kLeafTokens) * 64 : size_t(kLeafTokens) * 16;
    for (; c + 16 * kWide <= kv.dv; c += 16 * kWide) {
      if (kv.f32)
        dot_f32<R, kWide>((const float*)p, p_stride / 4, (const float*)(w + c / 16 * stride), stride / 4, tokens,
                          (float*)out + c, ld, add);
      else
        dot_15<R, kWide>(p, p_stride, plane, w + c / 16 * stride, stride, kq, offsets, out + c, ld, add);
    }
    for (; c < kv.dv; c += 16) {
      if (kv.f32)
        dot_f32<R, 1>((const float*)p, p_stride / 4, (const float*)(w + c / 16 * stride), 0, tokens, (float*)out + c,
                      ld, add);
      else
        dot_15<R, 1>(p, p_stride, plane, w + c / 16 * stride, 0, kq, offsets, out + c, ld, add);
    }
  }
}

// The weights of one row's tokens [0, n): softmax without its division, quantized for the product with V.
// `scores` holds sums on entry. Returns the factor of the product.
inline float soft_weights(const Step& s, int slot, int layer, int head, float q_scale, int n, float* scores,
                          uint8_t* out, int plane, int32_t* offset) {
  const KvGeometry& kv = s.kv;
  F32 top = splat(-__builtin_inff());
  for (int t = 0; t < n; t += 16) {
    F32 y;
    if (kv.f32) {
      y = load(scores + t) * splat(q_scale);
    } else {
      const float* k_scale = reinterpret_cast<const float*>(leaf_at(s, slot, t / kLeafTokens, layer, head) +
                                                            kv.k_bytes + kv.v_bytes);
      y = to_float(bits(load(scores + t))) * (load(k_scale + t % kLeafTokens) * splat(q_scale));
    }
    if (n - t < 16) y = select(less(iota(), splat(int32_t(n - t))), y, splat(-__builtin_inff()));
    store(scores + t, y);
    top = max(y, top);
  }
  const F32 highest = splat(max_lane(top));
  F32 total = splat(0.0f), largest = splat(0.0f);
  for (int t = 0; t < n; t += 16) {
    F32 e = exp(load(scores + t) - highest);
    if (n - t < 16) e = select(less(iota(), splat(int32_t(n - t))), e, splat(0.0f));
    total = total + e;
    if (!kv.f32) {
      const float* v_scale = reinterpret_cast<const float*>(leaf_at(s, slot, t / kLeafTokens, layer, head) +
                                                            kv.k_bytes + kv.v_bytes) + kLeafTokens;
      // Past n the scale may be anything: the mask comes last.
      e = e * load(v_scale + t % kLeafTokens);
      if (n - t < 16) e = select(less(iota(), splat(int32_t(n - t))), e, splat(0.0f));
      largest = max(e, largest);
    }
    store(scores + t, e);
  }
  const float denominator = sum(total);
  if (kv.f32) {
    std::memcpy(out, scores, sizeof(float) * round_up(n, 16));
    return 1.0f / denominator;
  }
  // n * limit * 127 < 2^31: the product with V is exact however long the context is.
  const float limit = float(imin(kActMax, 16909320 / n)), highest_weight = max_lane(largest);
  const bool some = highest_weight > kTiny;
  const F32 inverse = splat(some ? limit / highest_weight : 0.0f);
  I32 weights = splat(int32_t(0));
  for (int t = 0; t < n; t += 16) {
    const I32 a = round_to_int(load(scores + t) * inverse);
    weights = weights + a;
    put(out, plane, t, a);
  }
  *offset = int32_t(uint32_t(sum(weights)) * 128u);
  return some ? highest_weight / limit / denominator : 0.0f;
}

constexpr int kFewRows = 2;  // up to here attention waits for memory

inline void attend(const Step& s, int layer, const Task& task, Scratch& scratch) {
  const KvGeometry& kv = s.kv;
  const Span& span = s.spans[task.span];
  const int q_plane = round_up(kv.dk, kDepth), p_plane = round_up(s.weights->config.block_size, kDepth);
  const int element = kv.f32 ? 4 : 2;
  const size_t q_stride = size_t(q_plane) * element, p_stride = size_t(p_plane) * element;
  const int ld = p_plane;
  const float root = 1.0f / __builtin_sqrtf(float(kv.d));
  for (int head = task.head0; head < task.head1; head++) {
    if (!span.kv_first)
      for (int row = span.row0; row < span.row0 + span.n; row++) write_kv(s, layer, row, head);
    for (int row0 = task.row0; row0 < task.row1; row0 += kMaxRows) {
      const int rows = imin(kMaxRows, task.row1 - row0);
      float q_scale[kMaxRows];
      int32_t offsets[kMaxRows] = {};
      for (int r = 0; r < rows; r++) {
        float* padded = scratch.row;
        std::memcpy(padded, s.qkv + (row0 + r) * s.ldqkv + head * kv.d, sizeof(float) * kv.d);
        std::memset(padded + kv.d, 0, sizeof(float) * 16);
        uint8_t* to = scratch.att_act + r * q_stride;
        const int limit = imin(kActMax, 16909320 / kv.d);
        if (kv.f32) std::memcpy(to, padded, sizeof(float) * kv.d);
        q_scale[r] = kv.f32 ? root : quantize_15(padded, kv.d, q_plane, limit, to, offsets + r) * root;
      }
      const int longest = s.positions[row0 + rows - 1] + 1;
      // K and V of one head are pieces of a few KB that no hardware prefetcher follows: V is fetched while K is used, and
      // the next head's K while V is.
      for (int t = 0; t < longest; t += kLeafTokens) {
        const uint8_t* leaf = leaf_at(s, span.slot, t / kLeafTokens, layer, head);
        if (rows <= kFewRows) {
          const size_t share = kv.v_bytes * imin(kLeafTokens, longest - t) / kLeafTokens;
          for (size_t panel = 0; panel < kv.v_bytes; panel += kv.v_bytes * 16 / kv.dv)
            for (size_t i = 0; i < share * 16 / kv.dv; i += 64) prefetch(leaf + kv.k_bytes + panel + i);
          for (size_t i = 0; i < 2 * kLeafTokens * sizeof(float); i += 64) prefetch(leaf + kv.k_bytes + kv.v_bytes + i);
        }
        leaf_scores(rows, kv, scratch.att_act, q_stride, q_plane, offsets, leaf,
                    imin(4, (longest - t + 15) / 16), reinterpret_cast<int32_t*>(scratch.scores) + t, ld);
      }
      float factor[kMaxRows];
      for (int r = 0; r < rows; r++) {
        const int n = s.positions[row0 + r] + 1;
        uint8_t* to = scratch.att_act + r * p_stride;
        factor[r] = soft_weights(s, span.slot, layer, head, q_scale[r], n, scratch.scores + size_t(r) * ld, to, p_plane,
                                 offsets + r);
        // Later rows of the block see more tokens: for this one they weigh nothing.
        for (int t = round_up(n, 16); t < round_up(longest, 16); t += 16) {
          if (kv.f32) store(reinterpret_cast<float*>(to) + t, splat(0.0f));
          else put(to, p_plane, t, splat(int32_t(0)));
        }
      }
      for (int t = 0; t < longest; t += kLeafTokens) {
        if (rows <= kFewRows && head + 1 < task.head1) {
          const uint8_t* next = leaf_at(s, span.slot, t / kLeafTokens, layer, head + 1);
          for (size_t i = 0; i < kv.k_bytes * imin(kLeafTokens, round_up(longest - t, 16)) / kLeafTokens; i += 64)
            prefetch(next + i);
        }
        leaf_values(rows, kv, scratch.att_act + size_t(t) * (kv.f32 ? 4 : kBytes ? 1 : 2), p_stride, p_plane,
                    offsets,
                    leaf_at(s, span.slot, t / kLeafTokens, layer, head), imin(kLeafTokens, longest - t),
                    reinterpret_cast<int32_t*>(scratch.out), kv.dv, t > 0);
      }
      for (int r = 0; r < rows; r++) {
        alignas(64) float y[16];
        float* to = s.att + (row0 + r) * s.ldx + head * kv.d;
        for (int i = 0; i < kv.d; i += 16) {
          const F32 value = load(scratch.out + r * kv.dv + i);
          store(y, (kv.f32 ? value : to_float(bits(value))) * splat(factor[r]));
          std::memcpy(to + i, y, sizeof(float) * imin(16, kv.d - i));
        }
      }
    }
  }
}

// ---- the model ------------------------------------------------------------------------------------------------------

inline void forward(const Step& s, Cursor& cursor, int64_t& last) {
  const Weights& w = *s.weights;
  const Config& c = w.config;
  const int rows = s.num_rows, row_chunks = imin(rows, 4 * s.team->size());
  const Then gelu = c.erf ? Then::kGeluErf : Then::kGeluTanh;
#if defined(NANOGPT_AMX)
  AmxTiles tiles;
#endif
  phase(s, cursor, row_chunks, [&](int chunk) {
    for (int r = rows * chunk / row_chunks; r < rows * (chunk + 1) / row_chunks; r++) {
      float* x = s.x + r * s.ldx;
      const float* p = w.wpe + size_t(s.positions[r]) * round_up(c.n_embd, kDepth);
      embedding_row(w.wte, s.tokens[r], x);
      for (int i = 0; i < c.n_embd; i++) x[i] = x[i] + p[i];
    }
  });
  lap(s, cursor, Part::kEmbedding, last);
  for (int i = 0; i < c.n_layer; i++) {
    const Layer& layer = w.layers[i];
    matmul(s, cursor, layer.qkv, rows, s.qkv, s.ldqkv, Then::kStore, [&](int r, float* out) {
      layer_norm(s.x + r * s.ldx, c.n_embd, layer.ln1_w, layer.ln1_b, c.eps, out);
      return out;
    });
    lap(s, cursor, Part::kQkv, last);
    if (s.any_kv_first) {
      phase(s, cursor, row_chunks, [&](int chunk) {
        for (int r = rows * chunk / row_chunks; r < rows * (chunk + 1) / row_chunks; r++)
          if (s.spans[s.row_span[r]].kv_first)
            for (int head = 0; head < c.n_head; head++) write_kv(s, i, r, head);
      });
    }
    phase(s, cursor, s.num_tasks, [&](int task) { attend(s, i, s.tasks[task], s.scratch[cursor.thread]); });
    lap(s, cursor, Part::kAttention, last);
    matmul(s, cursor, layer.proj, rows, s.x, s.ldx, Then::kAdd, [&](int r, float*) { return s.att + r * s.ldx; });
    lap(s, cursor, Part::kProj, last);
    matmul(s, cursor, layer.fc, rows, s.h, s.ldh, gelu, [&](int r, float* out) {
      layer_norm(s.x + r * s.ldx, c.n_embd, layer.ln2_w, layer.ln2_b, c.eps, out);
      return out;
    });
    lap(s, cursor, Part::kFc, last);
    matmul(s, cursor, layer.fc_proj, rows, s.x, s.ldx, Then::kAdd, [&](int r, float*) { return s.h + r * s.ldh; });
    lap(s, cursor, Part::kFcProj, last);
  }
}

inline void head(const Step& s, Cursor& cursor) {
  const Weights& w = *s.weights;
#if defined(NANOGPT_AMX)
  AmxTiles tiles;
#endif
  matmul(s, cursor, w.head, s.num_out, s.logits, s.ld_logits, Then::kStore, [&](int r, float* out) {
    layer_norm(s.x + s.out_rows[r] * s.ldx, w.config.n_embd, w.lnf_w, w.lnf_b, w.config.eps, out);
    return out;
  });
}

inline void lane_maxima(const float* logits, int n, float* maxima) {
  for (int block = 0; block < n; block += 256, maxima += 16) {
    F32 top = load(logits + block);
    for (int i = block + 16; i < imin(n, block + 256); i += 16) top = max(load(logits + i), top);
    store(maxima, top);
  }
}

}  // namespace
}  // namespace nanogpt
