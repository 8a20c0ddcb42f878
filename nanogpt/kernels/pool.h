// A fixed team of threads that lives as long as the model. The caller is thread 0.
//
// A step is a row of phases; a phase is a row of chunks. Every thread has its share of a phase's chunks (so that it
// meets the same weights every step) and, when that is done, takes from the others'. A phase ends when its chunks are
// done, not when all threads have arrived: a thread that the operating system took off its CPU holds nobody up unless
// it holds a chunk, and finds out when it comes back that the work went on without it. On a server whose cores are
// shared with the HTTP workers that is the difference between a late token and none.
//
// A thread that waits spins for some microseconds (the next phase is near) and then sleeps: an idle server uses no CPU.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace nanogpt {

struct Step;

// A thread's place in a run: the number of the phase, over the team's whole life.
struct Cursor {
  uint64_t phase;
  int thread;
  int done;  // chunks of this phase that this thread did
};

class Team {
 public:
  using Job = void (*)(const Step& step, Cursor cursor);

  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }
  // Runs job on every thread with a copy of the step; returns when its last phase is done. One caller at a time.
  void run(const Step& step, Job job);
  // Returns when no thread is inside a job: before memory that jobs read is given back.
  void quiesce();

  // These are out of line on purpose: see simd.h.
  // Where a thread's share of a phase's chunks begins; it ends where the next thread's does.
  int share_begin(int num_chunks, int thread) const;
  // The next chunk of the phase for this thread, or -1. Whoever holds a chunk may rely on all earlier phases being done,
  // this one not being done, and the run going on.
  int take(Cursor& cursor, int num_chunks);
  // Reports this thread's chunks, waits for the others' and goes on to the next phase.
  void finish(Cursor& cursor, int num_chunks);

 private:
  struct alignas(64) Counter {
    std::atomic<uint64_t> value{0};  // the phase's number times 2^24, plus a count
  };
  static constexpr int kRing = 4;  // counters are used again by later phases: their numbers tell them apart
  static constexpr int kCountBits = 24;
  static constexpr uint64_t kPhasesOfRun = 1 << 16;

  void work(int thread);
  Counter& share(uint64_t phase, int thread) { return counters_[(phase % kRing) * (size_ + 1) + thread]; }
  Counter& finished(uint64_t phase) { return counters_[(phase % kRing) * (size_ + 1) + size_]; }

  const int size_;
  std::unique_ptr<Counter[]> counters_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;  // of the job and its step
  std::unique_ptr<Step> step_;
  Job job_ = nullptr;
  alignas(64) std::atomic<uint32_t> run_{0};
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<int32_t> busy_{0};
};

}  // namespace nanogpt
