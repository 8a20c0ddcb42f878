// What the machine itself can do with N threads: read memory at several sizes, and multiply-add in each number format.
// Usage: limits THREADS SIZE_KB... ; prints one JSON object. Built for the machine it runs on (-O3 -march=native).
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// All threads run work(thread) at the same time, `rounds` times over; seconds of the fastest of five tries.
double fastest(int threads, const std::function<void(int)>& work) {
  double best = 1e30;
  for (int attempt = 0; attempt < 5; ++attempt) {
    std::atomic<int> ready{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t)
      pool.emplace_back([&, t] {
        ++ready;
        while (!go) {
        }
        work(t);
      });
    while (ready < threads) std::this_thread::yield();
    double before = now();
    go = true;
    for (auto& thread : pool) thread.join();
    double seconds = now() - before;
    if (seconds < best) best = seconds;
  }
  return best;
}

volatile uint64_t sink;

typedef uint64_t Lane __attribute__((vector_size(64)));

double read_gb_per_s(int threads, size_t bytes) {
  size_t lanes = bytes / sizeof(Lane) / threads / 16 * 16;
  std::vector<Lane*> parts(threads);
  for (auto& part : parts) {
    part = static_cast<Lane*>(std::aligned_alloc(2 << 20, (lanes * sizeof(Lane) + (2 << 20)) >> 21 << 21));
    std::memset(static_cast<void*>(part), 1, lanes * sizeof(Lane));
  }
  // About 0.1 s a try, whatever the size.
  int rounds = static_cast<int>(4e9 / static_cast<double>(lanes * sizeof(Lane) * threads)) + 1;
  double seconds = fastest(threads, [&](int t) {
    Lane sums[16] = {};
    for (int round = 0; round < rounds; ++round) {
      const Lane* at = parts[t];
      for (size_t i = 0; i < lanes; i += 16)
        for (int k = 0; k < 16; ++k) sums[k] ^= at[i + k];
      asm volatile("" ::: "memory");
    }
    for (auto& sum : sums) sink = sum[0];
  });
  for (auto* part : parts) std::free(part);
  return static_cast<double>(lanes) * sizeof(Lane) * threads * rounds / seconds / 1e9;
}

constexpr int kRounds = 4'000'000;
#if defined(__AVX512F__)
constexpr int kSums = 24;
#define IN_REGISTER "+v"
#else
constexpr int kSums = 12;
#define IN_REGISTER "+x"
#endif

// Independent accumulators hide the latency of a multiply-add; there are as many as fit beside the inputs. `ops` counts a multiplication and an addition as two.
template <class V, class Step>
double rate(int threads, double ops, Step step) {
  double seconds = fastest(threads, [&](int) {
    V sums[kSums] = {};
    const Step own = step;
    for (int round = 0; round < kRounds; ++round)
#pragma GCC unroll 24
      for (int k = 0; k < kSums; ++k) {
        own(sums[k]);
        asm volatile("" : IN_REGISTER(sums[k]));  // Nothing is folded away, nothing leaves its register.
      }
    V kept[kSums];
#pragma GCC unroll 24
    for (int k = 0; k < kSums; ++k) kept[k] = sums[k];
    asm volatile("" : : "m"(kept));
  });
  return ops * kSums * kRounds * threads / seconds / 1e12;
}

#if defined(__AMX_INT8__) && defined(__linux__)
// Tiles 0..3 are accumulators, 4..7 inputs: 16 rows of 64 bytes each. Linux wants a process to ask for AMX first.
double amx_rate(int threads, bool int8) {
  constexpr int kPermissionRequest = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kPermissionRequest, kTileData)) return 0;
  double seconds = fastest(threads, [&](int) {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    asm volatile("" ::: "memory");
    _tile_loadconfig(config);
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
    for (int round = 0; round < kRounds / 16; ++round) {
      if (int8) {
        _tile_dpbssd(0, 4, 6); _tile_dpbssd(1, 4, 7); _tile_dpbssd(2, 5, 6); _tile_dpbssd(3, 5, 7);
      } else {
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_release();
  });
  return 4.0 * 16 * 16 * (int8 ? 64 : 32) * 2 * (kRounds / 16) * threads / seconds / 1e12;
}
#endif

}  // namespace

int main(int count, char** words) {
  int threads = count > 1 ? std::atoi(words[1]) : 1;
  std::printf("{\"read_gb_per_s\": {");
  for (int i = 2; i < count; ++i) {
    size_t kb = std::strtoull(words[i], nullptr, 10);
    std::printf("%s\"%zu\": %.1f", i > 2 ? ", " : "", kb, read_gb_per_s(threads, kb << 10));
  }
  std::printf("}, \"tera_ops_per_s\": {\"any\": 0");
#if defined(__AVX512F__)
  {
    __m512 a = _mm512_set1_ps(1e-9f);
    std::printf(", \"fp32 AVX-512\": %.2f", rate<__m512>(threads, 32, [=](__m512& s) { s = _mm512_fmadd_ps(a, a, s); }));
  }
#elif defined(__AVX2__) && defined(__FMA__)
  {
    __m256 a = _mm256_set1_ps(1e-9f);
    std::printf(", \"fp32 AVX2\": %.2f", rate<__m256>(threads, 16, [=](__m256& s) { s = _mm256_fmadd_ps(a, a, s); }));
  }
#endif
#if defined(__AVX512BF16__)
  {
    __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1e-9f), _mm512_set1_ps(1e-9f));
    std::printf(", \"bf16 AVX-512\": %.2f", rate<__m512>(threads, 64, [=](__m512& s) { s = _mm512_dpbf16_ps(s, a, a); }));
  }
#endif
#if defined(__AVX512VNNI__)
  {
    __m512i a = _mm512_set1_epi8(1);
    std::printf(", \"int8 AVX-512 VNNI\": %.2f", rate<__m512i>(threads, 128, [=](__m512i& s) { s = _mm512_dpbusd_epi32(s, a, a); }));
  }
#elif defined(__AVX2__)
  {
    __m256i a = _mm256_set1_epi8(1), one = _mm256_set1_epi16(1);
    std::printf(", \"int8 AVX2\": %.2f", rate<__m256i>(threads, 64, [=](__m256i& s) {
      __m256i b = a;
      asm volatile("" : "+x"(b));  // Else the product is computed once, before the loop.
      s = _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(b, a), one));
    }));
  }
#endif
#if defined(__AMX_INT8__) && defined(__linux__)
  std::printf(", \"int8 AMX\": %.2f, \"bf16 AMX\": %.2f", amx_rate(threads, true), amx_rate(threads, false));
#endif
  std::printf("}}\n");
}
