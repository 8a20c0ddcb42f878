// A fixed team of threads that lives as long as the model. The caller is thread 0. A thread that has nothing to do
// spins for some microseconds (the next step or phase is near) and then sleeps, so that an idle server uses no CPU.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace nanogpt {

class Team {
 public:
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }
  // Runs job(thread) on every thread and returns when all are done. One caller at a time.
  void run(const std::function<void(int)>& job);
  // All threads of the running job meet here. Out of line on purpose: see simd.h on sharing between machines.
  void barrier();

 private:
  void work(int thread);
  const int size_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* job_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<uint32_t> job_number_{0};
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

}  // namespace nanogpt
