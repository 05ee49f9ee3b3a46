// Waiting for a change of shared memory, with a deadline.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace flashmoe::cpu {

using Clock = std::chrono::steady_clock;

// Signals are plain atomics; the doorbell beside them wakes those who sleep for one. A waiter first
// yields, which is cheap while the awaited thread is about to finish, then sleeps, so that many PEs
// can share few cores.
//
// No wake-up is lost: the writer changes the signal before it reads `sleepers_`, the waiter raises
// `sleepers_` before it reads the signal, and all four are sequentially consistent, so one of them
// sees the other. If it is the writer, it takes the mutex, which the waiter holds from its last
// look at the signal until it sleeps.
class Doorbell {
 public:
  // To be called after a signal was changed with a sequentially consistent write.
  void ring() {
    if (sleepers_.load() == 0) return;
    const std::lock_guard lock(mutex_);
    changed_.notify_all();
  }

  // Waits until `ready()`, which reads its signals sequentially consistently. False: the deadline
  // passed.
  template <typename Ready>
  bool wait(Ready ready, Clock::time_point deadline) {
    constexpr int kYields = 64;
    for (int i = 0; i < kYields; ++i) {
      if (ready()) return true;
      std::this_thread::yield();
    }
    std::unique_lock lock(mutex_);
    sleepers_.fetch_add(1);
    const bool in_time = changed_.wait_until(lock, deadline, ready);
    sleepers_.fetch_sub(1);
    return in_time;
  }

 private:
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

}  // namespace flashmoe::cpu
