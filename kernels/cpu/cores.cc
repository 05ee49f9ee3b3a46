#include "kernels/cpu/cores.h"

#include <unistd.h>

#include <algorithm>

namespace flashmoe::cpu {
namespace {

// Thread 0 is the calling one. Where the system refuses, the thread stays where it is.
void run_on(pid_t thread, int cpu) {
  if (cpu < 0) return;
  cpu_set_t only;
  CPU_ZERO(&only);
  CPU_SET(cpu, &only);
  sched_setaffinity(thread, sizeof(only), &only);
}

}  // namespace

Cores::Cores(int32_t count) : count_(count), free_(count, kAnyCpu) {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0 || CPU_COUNT(&allowed) != count) return;
  int cpu = 0;
  for (int& core : free_) {
    while (!CPU_ISSET(cpu, &allowed)) ++cpu;
    core = cpu++;
  }
}

int Cores::take(Urgency urgency, int wish) {
  std::unique_lock lock(mutex_);
  if (!free_.empty()) {
    const auto wished = std::find(free_.begin(), free_.end(), wish);
    const auto core = wished == free_.end() ? free_.begin() : wished;
    const int cpu = *core;
    free_.erase(core);
    lock.unlock();
    run_on(0, cpu);
    return cpu;
  }
  Waiter me{.urgency = urgency, .thread = gettid()};
  Waiter** place = &waiting_;
  while (*place != nullptr && (*place)->urgency >= urgency) place = &(*place)->next;
  me.next = *place;
  *place = &me;
  me.changed.wait(lock, [&] { return me.has_core; });
  return me.cpu;
}

void Cores::give(int cpu) {
  const std::lock_guard lock(mutex_);
  if (waiting_ == nullptr) {
    free_.push_back(cpu);
    return;
  }
  Waiter& next = *waiting_;
  waiting_ = next.next;
  // Before it wakes, so that it wakes there; and under the lock, without which it could be gone.
  run_on(next.thread, cpu);
  next.cpu = cpu;
  next.has_core = true;
  next.changed.notify_one();
}

Cores::Hold::Hold(Cores* cores) : cores_(cores) {
  if (cores_ == nullptr) return;
  sched_getaffinity(0, sizeof(before_), &before_);
  cpu_ = cores_->take(kUrgent, kAnyCpu);
}

Cores::Hold::~Hold() {
  if (cores_ == nullptr) return;
  cores_->give(cpu_);
  if (cpu_ != kAnyCpu) sched_setaffinity(0, sizeof(before_), &before_);
}

Cores::Break::Break(Hold& hold, Urgency urgency) : hold_(hold), urgency_(urgency) {
  if (hold_.cores_ != nullptr) hold_.cores_->give(hold_.cpu_);
}

Cores::Break::~Break() {
  if (hold_.cores_ != nullptr) hold_.cpu_ = hold_.cores_->take(urgency_, hold_.cpu_);
}

}  // namespace flashmoe::cpu
