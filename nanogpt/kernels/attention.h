// Attention of a piece of the batch, and K and V to their leaves (layout.h).
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

// K and V of N tokens of one head, t .. t + N of a leaf, as int8. Of the tokens in a line of V all are ours, or the others
// are kept.
template <int N>
NG_INLINE void write_kv_tokens(const KvGeometry& kv, const float* k, const float* v, size_t ld, uint8_t* leaf, int t) {
  // Sixteen values from x + i on; a head that is no multiple of 16 is completed with zeros.
  const auto sixteen = [&](const float* x, int i) {
    if (i + 16 <= kv.d) return load(x + i);
    alignas(64) float padded[16] = {};
    for (int j = 0; j < kv.d - i; j++) padded[j] = x[i + j];
    return load(padded);
  };
  float* k_scale = reinterpret_cast<float*>(leaf + kv.k_bytes + kv.v_bytes) + t;
  const auto quantizer = [&](const float* x, float* scale) {
    F32 size = splat(0.0f);
    for (int i = 0; i < kv.d; i += 16) size = max(abs(sixteen(x, i)), size);
    const float top = max_lane(size);
    *scale = top > kTiny ? top / 127.0f : 0.0f;
    return splat(top > kTiny ? 127.0f / top : 0.0f);
  };
  F32 k_inverse[N], v_inverse[N];
  each<N>(NG_BODY(n) {
    k_inverse[n] = quantizer(k + n * ld, k_scale + n);
    v_inverse[n] = quantizer(v + n * ld, k_scale + kLeafTokens + n);
  });
  const I32 offset = splat(int32_t(128)), others = splat(N == 4 ? 0 : ~int32_t(0xffu << t % 4 * 8));
  uint8_t* kt = leaf + size_t(t / 16) * kv.dk * 16 + t % 16 * 4;
  uint8_t* vt = leaf + kv.k_bytes + t / 4 * 64;
  for (int i = 0; i < kv.d; i += 16) {
    uint8_t q[N][16];
    each<N>(NG_BODY(n) { store_bytes(q[n], round_to_int(sixteen(k + n * ld, i) * k_inverse[n]) + offset); });
    for (int j = 0; j < imin(16, kv.dk - i); j += 4)
      each<N>(NG_BODY(n) { std::memcpy(kt + (i + j) * 16 + 4 * n, q[n] + j, 4); });
    int32_t* line = reinterpret_cast<int32_t*>(vt + size_t(i) * kLeafTokens);
    I32 tokens = load(line) & others;
    each<N>(NG_BODY(n) {
      const I32 a = round_to_int(sixteen(v + n * ld, i) * v_inverse[n]) + offset;
      tokens = tokens | shift_left(a, (t + n) % 4 * 8);
    });
    store(line, tokens);
  }
}

// K and V of a span's rows to one head's leaves. One thread does all of them: tokens share lines.
inline void write_kv(const Step& s, int layer, const Span& span, int head) {
  const KvGeometry& kv = s.kv;
  const int c = kv.d * kv.n_head;
  for (int done = 0, n; done < span.n; done += n) {
    const int position = span.start + done, t = position % kLeafTokens;
    uint8_t* leaf = leaf_at(s, span.slot, position / kLeafTokens, layer, head);
    const float* k = s.qkv + (span.row0 + done) * s.ldqkv + c + head * kv.d;
    const float* v = k + c;
    n = !kv.f32 && t % 4 == 0 && span.n - done >= 4 ? 4 : 1;
    if (n == 4 && span.n - done >= 8) {
      // The next four tokens: pieces here and there, of floats and of the leaf, for each of which stores would wait.
      const int next = (position + 4) % kLeafTokens;
      for (int i = 0; i < 4; i++)
        for (int j = 0; j < kv.d; j += 16) {
          prefetch_near(k + (4 + i) * s.ldqkv + j);
          prefetch_near(v + (4 + i) * s.ldqkv + j);
        }
      const uint8_t* to = leaf_at(s, span.slot, (position + 4) / kLeafTokens, layer, head);
      for (int i = 0; i < kv.dv; i += 16) prefetch_near(to + kv.k_bytes + i * kLeafTokens + next / 4 * 64);
      for (int i = 0; i < kv.dk && next % 16 == 0; i += 4) prefetch_near(to + (next * kv.dk + i * 16));
    }
    if (kv.f32) {
      float* kt = reinterpret_cast<float*>(leaf);
      float* vt = reinterpret_cast<float*>(leaf + kv.k_bytes);
      for (int i = 0; i < kv.d; i++) kt[(t / 16 * kv.dk + i) * 16 + t % 16] = k[i];
      for (int i = 0; i < kv.d; i++) vt[(i / 16 * kLeafTokens + t) * 16 + i % 16] = v[i];
    } else if (n == 4) {
      write_kv_tokens<4>(kv, k, v, s.ldqkv, leaf, t);
    } else {
      write_kv_tokens<1>(kv, k, v, s.ldqkv, leaf, t);
    }
  }
}

// body(p, P) for panels p .. p + P until all are done; P is as large as there are registers for the sums of R rows.
template <int R, class Body>
NG_INLINE void by_panels(int panels, const Body& body) {
  constexpr std::integral_constant<int, kPanelsAtOnce == 4 ? (R <= 3 ? 4 : 2) : 1> wide;
  int p = 0;
  for (; p + wide <= panels; p += wide) body(p, wide);
  for (; p < panels; p++) body(p, std::integral_constant<int, 1>());
}

// One head of a leaf: scores' sums of `rows` queries with its 64 tokens / the tokens' weights with its V. `ahead`: see dot_15.
NG_INLINE void leaf_scores(int rows, const KvGeometry& kv, const uint8_t* q, size_t q_stride, int plane,
                           const int32_t* offsets, const uint8_t* leaf, int panels, int32_t* out, int ld, size_t ahead) {
  const size_t stride = kv.k_bytes / 4;
  with_constant<kMaxRows>(rows, NG_BODY(R) {
    by_panels<R>(panels, [&](int p, auto P) __attribute__((always_inline)) {
      const uint8_t* w = leaf + p * stride;
      if (kv.f32)
        dot_f32<R, P>((const float*)q, q_stride / 4, (const float*)w, stride / 4, kv.d, (float*)out + 16 * p, ld, false);
      else
        dot_15<R, P>(q, q_stride, plane, w, stride, kv.dk / 4, offsets, out + 16 * p, ld, false, ahead);
    });
  });
}
NG_INLINE void leaf_values(int rows, const KvGeometry& kv, const uint8_t* weights, size_t weights_stride, int plane,
                           const int32_t* offsets, const uint8_t* leaf, int tokens, int32_t* out, int ld, bool add,
                           size_t ahead) {
  const size_t stride = size_t(kLeafTokens) * (kv.f32 ? 64 : 16);
  with_constant<kMaxRows>(rows, NG_BODY(R) {
    by_panels<R>(kv.dv / kLanes, [&](int p, auto P) __attribute__((always_inline)) {
      const uint8_t* w = leaf + kv.k_bytes + p * stride;
      if (kv.f32)
        dot_f32<R, P>((const float*)weights, weights_stride / 4, (const float*)w, stride / 4, tokens, (float*)out + 16 * p,
                      ld, add);
      else
        dot_15<R, P>(weights, weights_stride, plane, w, stride, (tokens + 3) / 4, offsets, out + 16 * p, ld, add, ahead);
    });
  });
}

// The weights of one row's tokens [0, n): softmax without its division, quantized for the product with V.
// `scores` holds sums on entry. Returns the factor of the product.
inline float soft_weights(const Step& s, int slot, int layer, int head, float q_scale, int n, float* scores,
                          const Row15& out, int32_t* offset) {
  const KvGeometry& kv = s.kv;
  const uint8_t* first_scales = leaf_at(s, slot, 0, layer, head) + kv.k_bytes + kv.v_bytes;
  // Of K, 16 from token t on; those of V lie behind the leaf's of K.
  const auto scales = [&](int t) {
    return reinterpret_cast<const float*>(first_scales + size_t(t / kLeafTokens) * kv.block_bytes) + t % kLeafTokens;
  };
  F32 top = splat(-__builtin_inff());
  for (int t = 0; t < n; t += 16) {
    F32 y;
    if (kv.f32) {
      y = load(scores + t) * splat(q_scale);
    } else {
      y = to_float(bits(load(scores + t))) * (load(scales(t)) * splat(q_scale));
    }
    if (n - t < 16) y = select(less(iota(), splat(int32_t(n - t))), y, splat(-__builtin_inff()));
    store(scores + t, y);
    top = max(y, top);
  }
  const F32 highest = splat(max_lane(top));
  F32 total = splat(0.0f), largest = splat(0.0f);
  for (int t = 0; t < n; t += 16) {
    F32 e = exp<true>(load(scores + t) - highest);
    if (n - t < 16) e = select(less(iota(), splat(int32_t(n - t))), e, splat(0.0f));
    total = total + e;
    if (!kv.f32) {
      // Past n the scale may be anything: the mask comes last.
      e = e * load(scales(t) + kLeafTokens);
      if (n - t < 16) e = select(less(iota(), splat(int32_t(n - t))), e, splat(0.0f));
      largest = max(e, largest);
    }
    store(scores + t, e);
  }
  const float denominator = sum(total);
  if (kv.f32) {
    std::memcpy(out.at, scores, sizeof(float) * round_up(n, 16));
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
    put(out, t, a);
  }
  *offset = int32_t(uint32_t(sum(weights)) * 128u);
  return some ? highest_weight / limit / denominator : 0.0f;
}

inline void attend(const Step& s, int layer, int index, Scratch& scratch) {
  const KvGeometry& kv = s.kv;
  const Task& task = s.tasks[index];
  const Span& span = s.spans[task.span];
  const int q_plane = round_up(kv.dk, kDepth), p_plane = round_up(s.weights->config.block_size, kDepth);
  const int element = kv.f32 ? 4 : 2;
  const size_t q_stride = size_t(q_plane) * element, p_stride = size_t(p_plane) * element;
  const int ld = p_plane;
  const float root = 1.0f / __builtin_sqrtf(float(kv.d));
#if defined(NANOGPT_AMX)
  const bool tiles = !kv.f32 && task.row1 - task.row0 >= kAmxRows;
  const int at_once = tiles ? kTileRows : kMaxRows;
#else
  constexpr bool tiles = false;
  constexpr int at_once = kMaxRows;
#endif
  for (int head = task.head0; head < task.head1; head++) {
    if (!span.kv_first) write_kv(s, layer, span, head);
    for (int row0 = task.row0; row0 < task.row1; row0 += at_once) {
      const int rows = imin(at_once, task.row1 - row0);
      float q_scale[kScratchRows];
      int32_t offsets[kScratchRows] = {};
      for (int r = 0; r < rows; r++) {
        float* padded = scratch.row;
        std::memcpy(padded, s.qkv + (row0 + r) * s.ldqkv + head * kv.d, sizeof(float) * kv.d);
        std::memset(padded + kv.d, 0, sizeof(float) * 16);
        const Row15 to = row_15(scratch.att_act, r, q_stride, q_plane, tiles);
        const int limit = imin(kActMax, 16909320 / kv.d);
        if (kv.f32) std::memcpy(to.at, padded, sizeof(float) * kv.d);
        q_scale[r] = kv.f32 ? root : quantize_15(padded, kv.d, q_plane, limit, to, offsets + r) * root;
      }
      const int longest = s.positions[row0 + rows - 1] + 1;
      // K and V of one head are pieces of a few KB that no hardware prefetcher follows. Where they are read for a row or two
      // alone, the next head's (after the last one, the next task's) are fetched on the way, a line for each that is used:
      // at once they would stall the loads.
      const bool few = rows <= kFewRows;
      size_t ahead = 0;
      if (few && head + 1 < task.head1) {
        ahead = kv.leaf_bytes;
      } else if (few && index + 1 < s.num_tasks) {
        const Task& next = s.tasks[index + 1];
        ahead = leaf_at(s, s.spans[next.span].slot, 0, layer, next.head0) - leaf_at(s, span.slot, 0, layer, head);
      }
#if defined(NANOGPT_AMX)
      const uint8_t* first_leaf = leaf_at(s, span.slot, 0, layer, head);
      const auto leaf_of = [&](int panel) { return first_leaf + panel / 4 * kv.block_bytes; };
      if (tiles) {
        int32_t* scores = reinterpret_cast<int32_t*>(scratch.scores);
        amx_dot_15(scratch.att_act, q_plane / kDepth, offsets, rows, (longest + 15) / 16,
                   [&](int p) { return leaf_of(p) + p % 4 * (kv.k_bytes / 4); }, 1024,
                   [&](int p) { return scores + 16 * p; }, ld);
      }
#endif
      for (int t = 0; t < longest && !tiles; t += kLeafTokens) {
        const uint8_t* leaf = leaf_at(s, span.slot, t / kLeafTokens, layer, head);
        const size_t scales = kv.k_bytes + kv.v_bytes;
        if (few && head == task.head0) {
          const size_t share = kv.v_bytes * imin(kLeafTokens, longest - t) / kLeafTokens;
          for (size_t panel = 0; panel < kv.v_bytes; panel += kv.v_bytes * 16 / kv.dv)
            for (size_t i = 0; i < share * 16 / kv.dv; i += 64) prefetch_near(leaf + kv.k_bytes + panel + i);
        }
        if (few)
          for (size_t i = 0; i < 2 * kLeafTokens * sizeof(float); i += 64) prefetch_near(leaf + ahead + scales + i);
        leaf_scores(rows, kv, scratch.att_act, q_stride, q_plane, offsets, leaf,
                    imin(4, (longest - t + 15) / 16), reinterpret_cast<int32_t*>(scratch.scores) + t, ld, ahead);
      }
      float factor[kScratchRows];
      for (int r = 0; r < rows; r++) {
        const int n = s.positions[row0 + r] + 1;
        const Row15 to = row_15(scratch.att_act, r, p_stride, p_plane, tiles);
        factor[r] = soft_weights(s, span.slot, layer, head, q_scale[r], n, scratch.scores + size_t(r) * ld, to,
                                 offsets + r);
        // Later rows of the block see more tokens, and a tile has 64: for this row they weigh nothing.
        for (int t = round_up(n, 16); t < round_up(longest, tiles ? kLeafTokens : 16); t += 16) {
          if (kv.f32) store(reinterpret_cast<float*>(to.at) + t, splat(0.0f));
          else put(to, t, splat(int32_t(0)));
        }
      }
#if defined(NANOGPT_AMX)
      if (tiles) {
        int32_t* sums = reinterpret_cast<int32_t*>(scratch.out);
        amx_dot_15(scratch.att_act, (longest + kLeafTokens - 1) / kLeafTokens, offsets, rows, kv.dv / 16,
                   [&](int p) { return first_leaf + kv.k_bytes + p * kLeafTokens * 16; }, kv.block_bytes,
                   [&](int p) { return sums + 16 * p; }, kv.dv);
      }
#endif
      for (int t = 0; t < longest && !tiles; t += kLeafTokens) {
        leaf_values(rows, kv, scratch.att_act + size_t(t) * (kv.f32 ? 4 : kBytes ? 1 : 2), p_stride, p_plane,
                    offsets,
                    leaf_at(s, span.slot, t / kLeafTokens, layer, head), imin(kLeafTokens, longest - t),
                    reinterpret_cast<int32_t*>(scratch.out), kv.dv, t > 0, ahead);
      }
      for (int r = 0; r < rows; r++) {
        float* to = s.att + (row0 + r) * s.ldx + head * kv.d;
        for (int i = 0; i < kv.d; i += 16) {
          const F32 sums = load(scratch.out + r * kv.dv + i);
          const F32 y = (kv.f32 ? sums : to_float(bits(sums))) * splat(factor[r]);
          if (i + 16 <= kv.d) {
            store(to + i, y);
          } else {
            alignas(64) float rest[16];
            store(rest, y);
            for (int j = 0; j < kv.d - i; j++) to[i + j] = rest[j];
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace nanogpt
