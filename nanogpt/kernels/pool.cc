#include "pool.h"

#include "step.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nanogpt {
namespace {

// About 50 microseconds on today's machines (a pause is 20 to 140 cycles). Longer than a phase is uneven, and than the
// gap between two steps; shorter than a time slice: spinning through one would keep the awaited thread off the CPU.
constexpr int kSpins = 3000;

inline void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Team::Team(int size)
    : size_(size), counters_(std::make_unique<Counter[]>(kRing * (size + 1))), step_(std::make_unique<Step>()) {
  for (int i = 1; i < size; i++) threads_.emplace_back([this, i] { work(i); });
}

Team::~Team() {
  stop_.store(true);
  run_.fetch_add(1);
  run_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Team::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    for (int i = 0; i < kSpins && run_.load(std::memory_order_acquire) == seen; i++) pause_cpu();
    run_.wait(seen, std::memory_order_acquire);
    if (stop_.load()) return;
    Step step;
    Job job;
    {
      std::lock_guard lock(mutex_);
      seen = run_.load(std::memory_order_relaxed);
      step = *step_;
      job = job_;
      busy_.fetch_add(1);
    }
    if (job) job(step, {seen * kPhasesOfRun, thread, 0});
    busy_.fetch_sub(1, std::memory_order_release);
    busy_.notify_all();
  }
}

void Team::run(const Step& step, Job job) {
  uint32_t number;
  {
    std::lock_guard lock(mutex_);
    *step_ = step;
    job_ = job;
    number = run_.fetch_add(1, std::memory_order_release) + 1;
  }
  if (size_ > 1) run_.notify_all();
  job(step, {number * kPhasesOfRun, 0, 0});
}

void Team::quiesce() {
  {
    std::lock_guard lock(mutex_);
    job_ = nullptr;  // a thread that wakes up late finds nothing to do
  }
  for (int32_t busy; (busy = busy_.load(std::memory_order_acquire)) != 0;) busy_.wait(busy);
}

int Team::share_begin(int num_chunks, int thread) const {
  return int(int64_t(num_chunks) * thread / size_);
}

int Team::take(Cursor& cursor, int num_chunks) {
  for (int i = 0; i < size_; i++) {
    const int owner = cursor.thread + i < size_ ? cursor.thread + i : cursor.thread + i - size_;
    const int first = share_begin(num_chunks, owner), last = share_begin(num_chunks, owner + 1);
    std::atomic<uint64_t>& counter = share(cursor.phase, owner).value;
    uint64_t value = counter.load(std::memory_order_relaxed);
    for (;;) {
      if (value >> kCountBits > cursor.phase) return -1;  // the run went on without this thread
      const uint64_t base = cursor.phase << kCountBits;
      const int count = value < base ? 0 : int(value - base);
      if (first + count >= last) break;
      if (counter.compare_exchange_weak(value, base + count + 1, std::memory_order_acquire)) {
        cursor.done++;
        return first + count;
      }
    }
  }
  return -1;
}

void Team::finish(Cursor& cursor, int num_chunks) {
  const uint64_t base = cursor.phase << kCountBits, full = base + uint64_t(num_chunks);
  std::atomic<uint64_t>& counter = finished(cursor.phase).value;
  uint64_t value = counter.load(std::memory_order_acquire);
  if (cursor.done) {
    uint64_t next;
    do {
      next = (value < base ? base : value) + uint64_t(cursor.done);
    } while (!counter.compare_exchange_weak(value, next, std::memory_order_acq_rel));
    value = next;
    if (value == full && size_ > 1) counter.notify_all();
  }
  for (int i = 0; value < full; i++) {
    if (i < kSpins)
      pause_cpu();
    else
      counter.wait(value, std::memory_order_acquire);
    value = counter.load(std::memory_order_acquire);
  }
  cursor.phase++;
  cursor.done = 0;
}

}  // namespace nanogpt
