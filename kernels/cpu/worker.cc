#include "kernels/cpu/worker.h"

#include <utility>

namespace flashmoe::cpu {

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

void Worker::wake_somebody() {
  if (waiting_ > 0) {
    changed_.notify_one();
  } else {
    threads_.emplace_back([this] { serve(); });
  }
}

void Worker::serve() {
  std::unique_lock lock(mutex_);
  for (;;) {
    ++waiting_;
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
