// What a thread knows to have happened (vector clocks), for thousands of threads.
//
// A plain vector clock has one entry per thread. Here the lanes of a warp draw the numbers of their
// epochs from one counter, so that one entry per warp says "all epochs of this warp's lanes up to
// n", and only what is known about a single lane beyond that is listed. Those who are not threads
// (the copies that complete on an mbarrier, the wgmmas of a warpgroup) have an entry each. Clocks
// are immutable and shared: after a barrier, all its threads hold the same one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace flashmoe::emulator {

// Who accesses memory: a thread of the launch, or an agent (see Clocks).
using Id = uint16_t;

struct LaneEpoch {
  Id thread;
  uint32_t epoch;
};

struct Clock {
  int references = 0;
  std::vector<uint32_t> entries;  // of warps, then of agents; later ones count as 0
  std::vector<LaneEpoch> lanes;   // by thread; each beyond the entry of its warp
};

// A counted reference to a clock; null knows nothing. Only one OS thread uses them.
class ClockRef {
 public:
  ClockRef() = default;
  explicit ClockRef(Clock* clock) : clock_(clock) { ++clock_->references; }
  ClockRef(const ClockRef& other) : clock_(other.clock_) {
    if (clock_) ++clock_->references;
  }
  ClockRef(ClockRef&& other) noexcept : clock_(std::exchange(other.clock_, nullptr)) {}
  ClockRef& operator=(ClockRef other) noexcept {
    std::swap(clock_, other.clock_);
    return *this;
  }
  ~ClockRef() {
    if (clock_ && --clock_->references == 0) release(clock_);
  }
  const Clock* get() const { return clock_; }
  const Clock* operator->() const { return clock_; }
  explicit operator bool() const { return clock_ != nullptr; }
  bool operator==(const ClockRef& other) const { return clock_ == other.clock_; }

 private:
  static void release(Clock* clock);  // to the pool
  Clock* clock_ = nullptr;
};

// The clocks of a launch: ids below `threads` are threads, 32 to a warp; agents follow.
class Clocks {
 public:
  explicit Clocks(int threads) : threads_(threads), warps_(threads / 32) {}

  size_t entry_of(Id id) const {
    return id < threads_ ? id / 32u
                         : static_cast<size_t>(warps_) + id - static_cast<size_t>(threads_);
  }

  // Whether `clock` knows epoch `epoch` of `id`.
  bool knows(const Clock* clock, Id id, uint32_t epoch) const {
    if (!clock) return false;
    const size_t entry = entry_of(id);
    if (entry < clock->entries.size() && epoch <= clock->entries[entry]) return true;
    if (id >= threads_) return false;
    const auto lane = std::lower_bound(clock->lanes.begin(), clock->lanes.end(), id,
                                       [](const LaneEpoch& a, Id b) { return a.thread < b; });
    return lane != clock->lanes.end() && lane->thread == id && epoch <= lane->epoch;
  }

  // `clock` knows what `other` does, too.
  void add(ClockRef& clock, const ClockRef& other) {
    if (!other || clock == other) return;
    clock = clock ? join(clock, other) : other;
  }
  // `clock`, and epoch `epoch` of one thread or agent.
  ClockRef with(const ClockRef& clock, Id id, uint32_t epoch);
  // `clock`, and all epochs of the warp up to `epoch`.
  ClockRef with_warp(const ClockRef& clock, size_t warp, uint32_t epoch);

 private:
  ClockRef join(const ClockRef& a, const ClockRef& b);

  // Threads that wait for the same event with the same clock shall end with the same one.
  struct Memo {
    ClockRef a, b, joined;
  };
  static constexpr size_t kMemos = 64;

  int threads_, warps_;
  std::vector<Memo> memos_{kMemos};
  struct {
    ClockRef from, result;
    Id id = 0;
    uint32_t epoch = 0;
  } last_with_;
};

// A thread's two clocks (emulator.h).
struct View {
  ClockRef seen;
  ClockRef visible_to_async;

  bool empty() const { return !seen && !visible_to_async; }
};

}  // namespace flashmoe::emulator
