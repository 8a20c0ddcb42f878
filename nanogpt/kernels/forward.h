// A whole model step on one thread of the team: embedding, layers, attention, head. Compiled once an instruction set.
//
// Threads divide a matrix by its output columns and attention by sequences, heads and rows. Nothing that a thread
// computes depends on that division or on the other rows of the batch: integer sums are exact, and float sums run in a
// fixed order inside one row. So the bits of a row are the same in any company.
#pragma once

#include "attention.h"
#include "matmul.h"

namespace nanogpt {
namespace {

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
  Upcoming upcoming(s, cursor.thread);
  upcoming.begin(0);
  for (int i = 0; i < c.n_layer; i++) {
    const Layer& layer = w.layers[i];
    matmul(s, cursor, layer.qkv, rows, s.qkv, s.ldqkv, Then::kStore, upcoming, [&](int r, float* out) {
      layer_norm(s.x + r * s.ldx, c.n_embd, layer.ln1_w, layer.ln1_b, c.eps, out);
      return out;
    });
    lap(s, cursor, Part::kQkv, last);
    if (s.any_kv_first) {
      phase(s, cursor, s.num_spans * c.n_head, [&](int chunk) {
        const Span& span = s.spans[chunk / c.n_head];
        if (span.kv_first) write_kv(s, i, span, chunk % c.n_head);
      });
    }
    phase(s, cursor, s.num_tasks, [&](int task) { attend(s, i, task, s.scratch[cursor.thread]); });
    lap(s, cursor, Part::kAttention, last);
    upcoming.begin(i + 1);
    matmul(s, cursor, layer.proj, rows, s.x, s.ldx, Then::kAdd, upcoming, [&](int r, float*) { return s.att + r * s.ldx; });
    lap(s, cursor, Part::kProj, last);
    matmul(s, cursor, layer.fc, rows, s.h, s.ldh, gelu, upcoming, [&](int r, float* out) {
      layer_norm(s.x + r * s.ldx, c.n_embd, layer.ln2_w, layer.ln2_b, c.eps, out);
      return out;
    });
    lap(s, cursor, Part::kFc, last);
    matmul(s, cursor, layer.fc_proj, rows, s.x, s.ldx, Then::kAdd, upcoming, [&](int r, float*) { return s.h + r * s.ldh; });
    lap(s, cursor, Part::kFcProj, last);
  }
}

inline void head(const Step& s, Cursor& cursor) {
  const Weights& w = *s.weights;
#if defined(NANOGPT_AMX)
  AmxTiles tiles;
#endif
  Upcoming nothing(s, cursor.thread);
  matmul(s, cursor, w.head, s.num_out, s.logits, s.ld_logits, Then::kStore, nothing, [&](int r, float* out) {
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
