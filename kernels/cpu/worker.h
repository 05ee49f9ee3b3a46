// The thread that runs one worker's share of a PE's calls, in the order in which they were given.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace flashmoe::cpu {

// A job: works, then returns what is to be done once the worker is free for the next job (or null).
//
// The second part completes a future, upon which XLA goes on executing its program on this very
// thread, for as long as it likes and perhaps waiting for other devices. The next job must not wait
// for that: before the second part another thread takes over, one that waits already or a new one.
using Job = std::function<std::function<void()>()>;

class Worker {
 public:
  // Starts the first thread, so that later, with a call under way, giving it a job cannot fail.
  // Throws std::system_error if the system has no thread left.
  Worker();
  // Jobs that have not begun are forgotten.
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  void give(Job job);

 private:
  void serve();
  // Both with mutex_ held:
  void add_thread();
  void wake_somebody();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  std::vector<std::thread> threads_;
  int waiting_ = 0;       // threads that wait for a job or are about to
  bool working_ = false;  // a thread is in the first part of a job
  bool stopping_ = false;
};

}  // namespace flashmoe::cpu
