#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nanogpt {
namespace {

// About 50 microseconds on today's machines (a pause is 20 to 140 cycles). Longer than the gap between two phases,
// shorter than a scheduler's time slice: spinning through one would only keep the awaited thread off the CPU.
constexpr int kSpins = 3000;

inline void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void await_change(std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < kSpins; i++) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause_cpu();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

Team::Team(int size) : size_(size) {
  for (int i = 1; i < size; i++) threads_.emplace_back([this, i] { work(i); });
}

Team::~Team() {
  stop_ = true;
  job_number_.fetch_add(1, std::memory_order_release);
  job_number_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Team::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    await_change(job_number_, seen);
    seen++;
    if (stop_) return;
    (*job_)(thread);
    barrier();
  }
}

void Team::run(const std::function<void(int)>& job) {
  if (size_ == 1) return job(0);
  job_ = &job;
  job_number_.fetch_add(1, std::memory_order_release);
  job_number_.notify_all();
  job(0);
  barrier();
}

void Team::barrier() {
  if (size_ == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == uint32_t(size_)) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
  } else {
    await_change(phase_, phase);
  }
}

}  // namespace nanogpt
