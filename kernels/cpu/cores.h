// The cores of the process, shared out among the workers that have something to compute.
//
// Were more workers to compute than there are cores, the system would switch between them in the
// midst of tiles, and the weights of all their experts would drive each other from the caches. So a
// worker takes a core, keeps it from tile to tile, and gives it up only while it waits for others.
// Whoever waits for a core thus waits for workers that compute, and those never wait for a core: no
// deadlock can come of it, in whatever order the cores are given.
#pragma once

#include <sched.h>

#include <condition_variable>
#include <cstdint>
#include <limits>
#include <mutex>
#include <vector>

namespace flashmoe::cpu {

// How much depends on a worker: among those who wait for a core the highest goes first, of equals
// who came first.
using Urgency = int64_t;
// Of work that is short and that others wait for.
inline constexpr Urgency kUrgent = std::numeric_limits<Urgency>::max();

class Cores {
 public:
  // If the calling thread may run on `count` CPUs, each core is one of them, and a thread that has
  // it runs there only. Left to itself the system often wakes a worker on the CPU of one that
  // computes, and notices some milliseconds later that another CPU is free. With any other `count`
  // the system places them.
  explicit Cores(int32_t count);
  Cores(const Cores&) = delete;
  Cores& operator=(const Cores&) = delete;

  int32_t count() const { return count_; }

  class Break;

  // A thread's core, while it lives. Where `cores` is null, that is any.
  class Hold {
   public:
    explicit Hold(Cores* cores);
    // From then on the thread may run where it might before.
    ~Hold();
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;

   private:
    friend class Break;
    Cores* const cores_;
    cpu_set_t before_{};
    int cpu_ = kAnyCpu;
  };

  // Gives the core up while it lives.
  class Break {
   public:
    Break(Hold& hold, Urgency urgency);
    ~Break();
    Break(const Break&) = delete;
    Break& operator=(const Break&) = delete;

   private:
    Hold& hold_;
    const Urgency urgency_;
  };

 private:
  static constexpr int kAnyCpu = -1;

  struct Waiter {
    Urgency urgency;
    pid_t thread;
    Waiter* next = nullptr;
    bool has_core = false;
    int cpu = kAnyCpu;
    std::condition_variable changed{};
  };

  // Returns the core's CPU, `wish` if it is free.
  int take(Urgency urgency, int wish);
  void give(int cpu);

  const int32_t count_;
  std::mutex mutex_;
  std::vector<int> free_;      // the CPUs of the free cores
  Waiter* waiting_ = nullptr;  // the most urgent, then the others; on the stacks of their threads
};

}  // namespace flashmoe::cpu
