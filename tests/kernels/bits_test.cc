// The bits of a few random models' logits, as hashes. One golden file serves every instruction set and machine:
//
//   bits_test             prints the lines of the golden file, by the best instruction set here
//   bits_test FILE [ISA]  compares every usable instruction set (or one), with 1, 2 and 3 threads, whole and in chunks
//
// Stands alone (no Python), so that it also runs cross-compiled under qemu, and under sanitizers.
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <numeric>
#include <sstream>

#include "model.h"
#include "pack.h"

using namespace nanogpt;

namespace {

struct Random {
  uint64_t state = 88172645463325252u;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 33);
  }
  // About normal, by exact arithmetic only: library functions differ between machines.
  float weight() { return (float(next() % 1024 + next() % 1024 + next() % 1024) - 1534.5f) * (1.0f / 4096.0f); }
};

struct Case {
  const char* name;
  Config config;
  Kind kind;
  bool even = false;  // a matrix's inputs are all alike, and every fourth output's weights: sums as large as they can be
};

std::vector<Case> cases() {
  Config small, odd, wide;
  small.n_layer = 2, small.n_head = 2, small.n_embd = 16, small.block_size = 24, small.vocab_size = 40;
  small.num_tokens = 37, small.n_inner = 64;
  odd.n_layer = 2, odd.n_head = 3, odd.n_embd = 51, odd.block_size = 70, odd.vocab_size = 65, odd.num_tokens = 65;
  odd.n_inner = 77, odd.erf = true, odd.tied = false;
  wide.n_layer = 2, wide.n_head = 2, wide.n_embd = 128, wide.block_size = 150, wide.vocab_size = 300;
  wide.num_tokens = 289, wide.n_inner = 512;
  std::vector<Case> all;
  for (const Kind kind : {Kind::kI8, Kind::kI4, Kind::kF32}) {
    const bool i8 = kind == Kind::kI8, i4 = kind == Kind::kI4;
    all.push_back({i8 ? "small-int8" : i4 ? "small-int4" : "small-fp32", small, kind});
    all.push_back({i8 ? "odd-int8" : i4 ? "odd-int4" : "odd-fp32", odd, kind});
    all.push_back({i8 ? "wide-int8" : i4 ? "wide-int4" : "wide-fp32", wide, kind});
    if (i8 || i4) all.push_back({i8 ? "even-int8" : "even-int4", wide, kind, true});
  }
  return all;
}

struct Packed {
  std::vector<Kind> kinds;
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* data;
};

Packed pack(const Case& c) {
  Packed p;
  p.kinds.assign(Layout::num_matrices(c.config), c.kind);
  const Layout layout(c.config, p.kinds);
  p.memory = std::make_unique<uint8_t[]>(layout.bytes() + 64);
  p.data = p.memory.get() + (64 - reinterpret_cast<uintptr_t>(p.memory.get()) % 64) % 64;
  Random random;
  for (const Entry& e : layout.entries()) {
    std::vector<float> weight(size_t(e.n) * e.k), bias(e.n);
    const bool norm = e.name.find("ln_") != std::string::npos && e.name.find("weight") != std::string::npos;
    for (float& x : weight) x = random.weight() + (norm ? 1.0f : 0.0f);
    for (float& x : bias) x = random.weight();
    if (c.even && e.name.find("ln_") != std::string::npos) {
      const bool weights = e.name.find("weight") != std::string::npos, second = e.name.find("ln_2") != std::string::npos;
      for (float& x : weight) x = weights ? 0.0f : second ? -1.0f : 1.0f;
    } else if (c.even && e.is_matrix) {
      for (int n = 0; n < e.n; n += 4)
        for (int k = 0; k < e.k; k++) weight[size_t(n) * e.k + k] = n % 8 ? 0.25f : -0.25f;
    }
    if (e.is_matrix)
      pack_matrix(e, weight.data(), bias.data(), p.data, 2);
    else
      pack_vector(e, weight.data(), p.data);
  }
  return p;
}

uint64_t hash(uint64_t h, const void* data, size_t size) {
  for (size_t i = 0; i < size; i++) h = (h ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211u;
  return h;
}

// Logits of every position of three texts that are computed together, in chunks of `chunk` tokens.
uint64_t run(const Case& c, const Packed& packed, const std::string& isa, int threads, int chunk) {
  Model model(c.config, packed.kinds, packed.data, 3, threads, isa);
  std::vector<std::vector<int32_t>> texts;
  Random random;
  for (int length : {c.config.block_size, c.config.block_size / 2 + 1, 3}) {
    texts.emplace_back(length);
    for (int32_t& token : texts.back()) token = int32_t(random.next() % uint32_t(c.config.num_tokens));
  }
  std::vector<std::vector<uint64_t>> hashes(3);
  for (int start = 0; start < c.config.block_size; start += chunk) {
    std::vector<int32_t> slots, starts, lengths, tokens;
    for (int b = 0; b < 3; b++) {
      const int n = std::min(chunk, int(texts[b].size()) - start);
      if (n <= 0) continue;
      slots.push_back(2 - b);
      starts.push_back(start);
      lengths.push_back(n);
      tokens.insert(tokens.end(), texts[b].begin() + start, texts[b].begin() + start + n);
    }
    Draws draws;
    model.step({int(slots.size()), slots.data(), starts.data(), lengths.data(), tokens.data()}, draws);
    std::vector<int32_t> rows(tokens.size());
    std::iota(rows.begin(), rows.end(), 0);
    const float* logits = model.head(rows.data(), int(rows.size()));
    int row = 0;
    for (size_t i = 0; i < slots.size(); i++)
      for (int j = 0; j < lengths[i]; j++, row++)
        hashes[2 - slots[i]].push_back(
            hash(14695981039346656037u, logits + row * model.ld_logits(), sizeof(float) * c.config.vocab_size));
  }
  uint64_t total = 14695981039346656037u;
  for (const auto& of_text : hashes) total = hash(total, of_text.data(), of_text.size() * sizeof(uint64_t));
  return total;
}

}  // namespace

int main(int argc, char** argv) {
  std::stringstream golden;
  if (argc > 1) golden << std::ifstream(argv[1]).rdbuf();
  int failures = 0;
  for (const Case& c : cases()) {
    const Packed packed = pack(c);
    if (argc == 1) {
      std::printf("%s %016llx\n", c.name, (unsigned long long)run(c, packed, "", 1, c.config.block_size));
      continue;
    }
    std::string name, expected;
    golden >> name >> expected;
    for (const std::string& isa : usable_isas()) {
      if (argc > 2 && isa != argv[2]) continue;
      for (const auto& [threads, chunk] : {std::pair{1, c.config.block_size}, {2, 7}, {3, c.config.block_size / 2}}) {
        char found[17];
        std::snprintf(found, sizeof found, "%016llx", (unsigned long long)run(c, packed, isa, threads, chunk));
        const bool same = name == c.name && expected == found;
        failures += !same;
        std::printf("%s %s %d threads, chunks of %d: %s\n", same ? "ok  " : "FAIL", c.name, threads, chunk, isa.c_str());
      }
    }
  }
  return failures != 0;
}
