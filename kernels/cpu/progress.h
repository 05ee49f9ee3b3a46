// When a device last got on.
#pragma once

#include <atomic>

#include "kernels/cpu/doorbell.h"

namespace flashmoe::cpu {

// When any worker of a device last finished a task, in whatever call. PEs take turns on the cores
// and finish earlier calls first, so one may wait for long for another that is well: its patience
// begins anew whenever the other gets on, and ends a deadline after it stopped.
class Progress {
 public:
  void note() { last_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed); }
  Clock::time_point last() const {
    return Clock::time_point(Clock::duration(last_.load(std::memory_order_relaxed)));
  }

 private:
  std::atomic<Clock::rep> last_{Clock::time_point::min().time_since_epoch().count()};
};

}  // namespace flashmoe::cpu
