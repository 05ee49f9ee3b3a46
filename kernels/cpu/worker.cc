#include "kernels/cpu/worker.h"

#include <cfenv>
#include <system_error>
#include <utility>

namespace flashmoe::cpu {

Worker::Worker() {
  const std::lock_guard lock(mutex_);
  add_thread();
}

Worker::~Worker() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Worker::give(Job job) {
  const std::lock_guard lock(mutex_);
  jobs_.push_back(std::move(job));
  if (!working_) wake_somebody();
}

void Worker::add_thread() {
  threads_.emplace_back([this] { serve(); });
  ++waiting_;
}

void Worker::wake_somebody() {
  if (waiting_ > 0) {
    changed_.notify_one();
    return;
  }
  try {
    add_thread();
  } catch (const std::system_error&) {
    // The system has no thread left. The job waits until one of ours is through with the second
    // part of its job.
  }
}

void Worker::serve() {
  // A thread begins with the floating-point environment of the one that made it, and XLA's threads
  // flush subnormal numbers to zero: results would depend on who entered the first call, and
  // subnormal halves would be lost.
  std::fesetenv(FE_DFL_ENV);
  std::unique_lock lock(mutex_);
  for (;; ++waiting_) {
    changed_.wait(lock, [&] { return stopping_ || (!working_ && !jobs_.empty()); });
    --waiting_;
    if (stopping_) return;
    Job job = std::move(jobs_.front());
    jobs_.pop_front();
    working_ = true;
    lock.unlock();
    std::function<void()> afterwards = job();
    job = nullptr;
    lock.lock();
    working_ = false;
    if (!afterwards) continue;
    if (!jobs_.empty()) wake_somebody();
    lock.unlock();
    afterwards();
    afterwards = nullptr;
    lock.lock();
  }
}

}  // namespace flashmoe::cpu
