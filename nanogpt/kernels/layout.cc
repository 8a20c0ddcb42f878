#include "layout.h"

namespace nanogpt {

size_t panel_bytes(Kind kind, int k_pad) {
  switch (kind) {
    case Kind::kF32: return size_t(k_pad) * kLanes * sizeof(float);
    case Kind::kI8: return size_t(k_pad) * kLanes;
    case Kind::kI4: return size_t(k_pad / kGroup) * kGroupBytes;
  }
  return 0;
}

void Layout::add(const std::string& name, bool is_matrix, Kind kind, int n, int k) {
  Entry entry{name, is_matrix, kind, n, k, bytes_, 0};
  if (is_matrix) {
    const size_t n_pad = round_up(n, kLanes), k_pad = round_up(k, kDepth);
    entry.bytes = n_pad / kLanes * panel_bytes(kind, k_pad) + 2 * n_pad * sizeof(float) + 64;
    if (kind == Kind::kI8) entry.bytes += k_pad / kLaneInputs * sizeof(int32_t);
  } else {
    entry.bytes = size_t(n) * round_up(k, kDepth) * sizeof(float);
  }
  entry.bytes = round_up<size_t>(entry.bytes, 64);
  bytes_ += entry.bytes;
  entries_.push_back(entry);
}

Layout::Layout(const Config& c, const std::vector<Kind>& kinds) : config_(c) {
  size_t next = 0;
  for (int i = 0; i < c.n_layer; i++) {
    const std::string block = "transformer.h." + std::to_string(i) + ".";
    for (const char* norm : {"ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"})
      add(block + norm, false, Kind::kF32, 1, c.n_embd);
    add(block + "attn.c_attn", true, kinds.at(next++), 3 * c.n_embd, c.n_embd);
    add(block + "attn.c_proj", true, kinds.at(next++), c.n_embd, c.n_embd);
    add(block + "mlp.c_fc", true, kinds.at(next++), c.n_inner, c.n_embd);
    add(block + "mlp.c_proj", true, kinds.at(next++), c.n_embd, c.n_inner);
  }
  add("transformer.ln_f.weight", false, Kind::kF32, 1, c.n_embd);
  add("transformer.ln_f.bias", false, Kind::kF32, 1, c.n_embd);
  add("transformer.wpe", false, Kind::kF32, c.block_size, c.n_embd);
  add("transformer.wte", true, kinds.at(next++), c.vocab_size, c.n_embd);
  if (!c.tied) add("lm_head", true, kinds.at(next++), c.vocab_size, c.n_embd);
}

const Entry* Layout::find(const std::string& name) const {
  for (const Entry& entry : entries_)
    if (entry.name == name) return &entry;
  return nullptr;
}

Matrix matrix_at(const Entry& e, const uint8_t* base) {
  Matrix m;
  m.kind = e.kind;
  m.n = e.n;
  m.k = e.k;
  m.n_pad = round_up(e.n, kLanes);
  m.k_pad = round_up(e.k, kDepth);
  m.panel_bytes = panel_bytes(e.kind, m.k_pad);
  m.data = base + e.offset;
  m.scale = reinterpret_cast<const float*>(m.data + m.panel_bytes * m.num_panels());
  m.bias = m.scale + m.n_pad;
  const int32_t act_max = *reinterpret_cast<const int32_t*>(m.bias + m.n_pad);
  m.act_max = act_max < 1 ? 1 : act_max > kActMax ? kActMax : act_max;  // a damaged file must not matter
  m.lane_limits = reinterpret_cast<const int32_t*>(m.bias + m.n_pad) + 16;
  return m;
}

Weights Layout::weights(const uint8_t* base) const {
  Weights w;
  w.config = config_;
  size_t next = 0;
  auto vector = [&] { return reinterpret_cast<const float*>(base + entries_[next++].offset); };
  auto matrix = [&] { return matrix_at(entries_[next++], base); };
  for (int i = 0; i < config_.n_layer; i++) {
    Layer layer;
    layer.ln1_w = vector();
    layer.ln1_b = vector();
    layer.ln2_w = vector();
    layer.ln2_b = vector();
    layer.qkv = matrix();
    layer.proj = matrix();
    layer.fc = matrix();
    layer.fc_proj = matrix();
    w.layers.push_back(layer);
  }
  w.lnf_w = vector();
  w.lnf_b = vector();
  w.wpe = vector();
  w.wte = matrix();
  w.head = config_.tied ? w.wte : matrix();
  return w;
}

KvGeometry::KvGeometry(const Config& c, bool f32_) : f32(f32_), n_layer(c.n_layer), n_head(c.n_head) {
  d = c.head_size();
  dk = round_up(d, 4);
  dv = round_up(d, kLanes);
  const size_t element = f32 ? sizeof(float) : 1;
  k_bytes = element * kLeafTokens * dk;
  v_bytes = element * kLeafTokens * dv;
  // int8 leaves end in two arrays of 64: scales of K, scales of V.
  leaf_bytes = round_up<size_t>(k_bytes + v_bytes + (f32 ? 0 : 2 * kLeafTokens * sizeof(float)), 64);
  block_bytes = leaf_bytes * n_head * n_layer;
  num_blocks = (c.block_size + kLeafTokens - 1) / kLeafTokens;
  slot_bytes = round_up<size_t>(block_bytes * num_blocks, 4096);
}

}  // namespace nanogpt
