// Doorbell, Cores and Worker, each on its own.
#include <sched.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels/cpu/cores.h"
#include "kernels/cpu/doorbell.h"
#include "kernels/cpu/worker.h"
#include "tests/native/harness.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace flashmoe::testing {
namespace {

using cpu::Clock;
using cpu::Cores;
using cpu::Doorbell;
using cpu::Job;
using cpu::Worker;

// A waiter that missed its wake-up goes on when its deadline passes, and finds the signal then. So
// a lost wake-up shows as a wait of this length. No thread that could run is held up for that long.
constexpr std::chrono::seconds kDeadline{20};

// Lets some time pass: mostly little, sometimes enough for the other side to fall asleep.
void dawdle(Random& random) {
  if (random.chance(0.05)) {
    std::this_thread::sleep_for(std::chrono::microseconds(random.between(1, 200)));
    return;
  }
  const Clock::time_point end = Clock::now() + std::chrono::nanoseconds(random.between(0, 30'000));
  while (Clock::now() < end) {
  }
}

// Waits until the signal is `expected`, and checks that it was the bell that ended the wait. A
// wake-up gets lost between a look at the signal and falling asleep, if at all. That moment is
// drawn out here: once the waiter has stopped yielding, time passes between the look and its
// outcome.
void wait_for_bell(Doorbell& bell, const std::atomic<int>& signal, int expected, Random& random) {
  constexpr int kYields = 60;
  int looks = 0;
  const auto ready = [&] {
    const bool seen = signal.load() == expected;
    if (!seen && ++looks > kYields) dawdle(random);
    return seen;
  };
  const Clock::time_point begin = Clock::now();
  check(bell.wait(ready, begin + kDeadline), "the signal was never seen");
  check(Clock::now() - begin < kDeadline / 2, "a wake-up was lost");
}

void ping_pong(uint64_t seed) {
  constexpr int kRounds = 20'000;
  std::array<Doorbell, 2> bells;
  std::array<std::atomic<int>, 2> signals{};
  on_threads(2, [&](int me) {
    Random random(seed + static_cast<uint64_t>(me));
    for (int round = 1; round <= kRounds; ++round) {
      if (me == 1) wait_for_bell(bells[1], signals[1], round, random);
      dawdle(random);
      signals[1 - me].store(round);
      bells[1 - me].ring();
      if (me == 0) wait_for_bell(bells[0], signals[0], round, random);
    }
  });
}

// As at a heap: several workers of a PE wait for different signals at one bell, several peers ring.
void many_at_one_bell(uint64_t seed) {
  constexpr int kPairs = 4, kRounds = 500;
  Doorbell bell;
  std::array<std::atomic<int>, kPairs> asked{}, answered{};
  on_threads(2 * kPairs, [&](int thread) {
    Random random(seed + static_cast<uint64_t>(thread));
    const int pair = thread / 2;
    const bool asks = thread % 2 == 0;
    for (int round = 1; round <= kRounds; ++round) {
      if (!asks) wait_for_bell(bell, asked[pair], round, random);
      (asks ? asked : answered)[pair].store(round);
      bell.ring();
      if (asks) wait_for_bell(bell, answered[pair], round, random);
    }
  });
}

void deadline_passes(uint64_t) {
  Doorbell bell;
  std::atomic<bool> stop{false};
  // Rung for something else all the time: neither ends the wait early nor puts it off.
  std::thread ringer([&] {
    while (!stop.load()) {
      bell.ring();
      std::this_thread::yield();
    }
  });
  const Clock::time_point begin = Clock::now();
  const bool in_time = bell.wait([] { return false; }, begin + std::chrono::milliseconds(100));
  const Clock::duration waited = Clock::now() - begin;
  stop.store(true);
  ringer.join();
  check(!in_time, "a wait for what never comes must end in vain");
  check(waited >= std::chrono::milliseconds(100), "the wait ended before the deadline");
  check(waited < kDeadline, "the wait went on past the deadline");
}

// Counts, and lets others wait for the count.
class Counter {
 public:
  void raise() {
    {
      const std::lock_guard lock(mutex_);
      ++count_;
    }
    changed_.notify_all();
  }
  void await(int count) {
    std::unique_lock lock(mutex_);
    check(changed_.wait_for(lock, std::chrono::minutes(1), [&] { return count_ >= count; }),
          "only " + std::to_string(count_) + " of " + std::to_string(count) + " jobs got there");
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int count_ = 0;
};

void in_order_one_at_a_time(uint64_t) {
  constexpr int kGivers = 4, kJobs = 300;
  Counter ended;
  std::atomic<bool> busy{false}, overlapped{false};
  std::array<std::vector<int>, kGivers> order;  // written by first parts only
  Worker worker;
  on_threads(kGivers, [&](int giver) {
    for (int i = 0; i < kJobs; ++i) {
      worker.give([&, giver, i]() -> std::function<void()> {
        if (busy.exchange(true)) overlapped.store(true);
        order[giver].push_back(i);
        busy.store(false);
        if (i % 3 == 0) return [&ended] { ended.raise(); };
        ended.raise();
        return nullptr;
      });
    }
  });
  ended.await(kGivers * kJobs);
  check(!overlapped.load(), "the first parts of two jobs overlapped");
  for (const std::vector<int>& jobs : order) {
    check(jobs.size() == kJobs && std::is_sorted(jobs.begin(), jobs.end()),
          "jobs did not run in the order in which they were given");
  }
}

// XLA may wait, on the thread that completed a future, for what other calls of the same device do.
void blocked_second_parts(uint64_t) {
  constexpr int kJobs = 40;
  for (int repetition = 0; repetition < 5; ++repetition) {
    Counter begun, ended;
    Worker worker;
    for (int i = 0; i < kJobs; ++i) {
      worker.give([&]() -> std::function<void()> {
        begun.raise();
        return [&] {
          begun.await(kJobs);
          ended.raise();
        };
      });
    }
    ended.await(kJobs);
  }
}

// XLA enters the next call of a device from the second part of the one before.
void given_from_second_parts(uint64_t seed) {
  constexpr int kChains = 8, kLength = 200;
  Counter ended;
  Worker worker;
  Random random(seed);
  std::function<Job(int)> link = [&](int left) -> Job {
    return [&, left]() -> std::function<void()> {
      return [&, left] {
        if (left > 0) {
          worker.give(link(left - 1));
        } else {
          ended.raise();
        }
      };
    };
  };
  for (int i = 0; i < kChains; ++i) worker.give(link(kLength));
  ended.await(kChains);
}

// XLA flushes subnormal numbers to zero on its threads, and a thread begins with the floating-point
// environment of the one that made it. A worker's results must not depend on who that was.
void default_float_environment(uint64_t) {
  Counter ended;
  float third = 0, subnormal = 0;
  std::unique_ptr<Worker> worker;
  std::thread giver([&] {
    std::fesetround(FE_UPWARD);
#if defined(__SSE2__)
    _mm_setcsr(_mm_getcsr() | 0x8040);  // flush to zero, denormals are zero
#endif
    worker = std::make_unique<Worker>();
    worker->give([&]() -> std::function<void()> {
      volatile float one = 1.0f, three = 3.0f, small = 0x1p-130f;
      third = one / three;
      subnormal = small / three;
      ended.raise();
      return nullptr;
    });
  });
  giver.join();
  ended.await(1);
  check(third == 1.0f / 3.0f, "a worker inherited the rounding mode of who gave it a job");
  check(subnormal == 0x1p-130f / 3.0f, "a worker flushes subnormal numbers to zero");
}

// CPUs on which the calling thread may run.
int allowed_cpus() {
  cpu_set_t allowed;
  check(sched_getaffinity(0, sizeof(allowed), &allowed) == 0, "no affinity");
  return CPU_COUNT(&allowed);
}

// Threads that take cores, compute, wait for one another and go on: never more of them at once than
// there are cores, each on a CPU of its own if there are as many, and none is forgotten.
void few_cores(int count, uint64_t seed) {
  constexpr int kThreads = 7, kRounds = 200;
  const int allowed = allowed_cpus();
  Cores cores(count);
  std::atomic<int> computing{0};
  std::vector<std::atomic<int>> on_cpu(static_cast<size_t>(CPU_SETSIZE));
  const auto compute = [&](Random& random) {
    check(computing.fetch_add(1) < count, "more threads have a core than there are");
    std::atomic<int>& here = on_cpu[static_cast<size_t>(sched_getcpu())];
    if (count == allowed) {
      check(allowed_cpus() == 1, "a thread with a core may run elsewhere");
      check(here.fetch_add(1) == 0, "two cores are one CPU");
    }
    dawdle(random);
    if (count == allowed) here.fetch_sub(1);
    computing.fetch_sub(1);
  };
  on_threads(kThreads, [&](int thread) {
    Random random(seed + static_cast<uint64_t>(thread));
    for (int round = 0; round < kRounds; ++round) {
      {
        Cores::Hold core(&cores);
        compute(random);
        for (int pauses = static_cast<int>(random.between(0, 3)); pauses > 0; --pauses) {
          {
            const Cores::Break pause(core, random.between(0, 5));
            dawdle(random);
          }
          compute(random);
        }
      }
      check(allowed_cpus() == allowed, "a thread stays bound after it gave its core back");
    }
  });
}

// The order in which threads get the only core that came to wait for it one after the other, each
// `apart` from the next, with these urgencies.
std::vector<int> order_of(const std::vector<cpu::Urgency>& urgencies,
                          std::chrono::milliseconds apart) {
  const int waiters = static_cast<int>(urgencies.size());
  Cores cores(1);
  std::atomic<int> paused{0}, called{0};
  std::vector<int> order;  // guarded by the core
  on_threads(waiters + 1, [&](int thread) {
    if (thread == waiters) {
      while (paused.load() < waiters) std::this_thread::yield();
      const Cores::Hold core(&cores);
      for (int next = 0; next < waiters; ++next) {
        called.store(next + 1);
        std::this_thread::sleep_for(apart);
      }
      return;
    }
    Cores::Hold core(&cores);
    {
      const Cores::Break pause(core, urgencies[static_cast<size_t>(thread)]);
      paused.fetch_add(1);
      while (called.load() <= thread) std::this_thread::yield();
    }
    order.push_back(thread);
  });
  return order;
}

// The most urgent goes first, of equals who came first.
void urgent_first(uint64_t) {
  const std::vector<int> expected{2, 5, 0, 3, 4, 1};
  std::vector<int> order;
  // A thread that is held up comes later than it should: then once more, with more time.
  for (std::chrono::milliseconds apart{10}; apart.count() < 1000; apart *= 3) {
    order = order_of({3, 1, cpu::kUrgent, 3, 2, cpu::kUrgent}, apart);
    if (order == expected) return;
  }
  check(false, "cores are given in another order");
}

}  // namespace

std::vector<Case> worker_cases() {
  return {
      {"doorbell: ping-pong loses no wake-up", ping_pong},
      {"doorbell: many waiters and ringers", many_at_one_bell},
      {"doorbell: the deadline passes", deadline_passes},
      {"cores: one for many threads", [](uint64_t seed) { few_cores(1, seed); }},
      {"cores: as many as the threads may run on",
       [](uint64_t seed) { few_cores(allowed_cpus(), seed); }},
      {"cores: more than the threads may run on",
       [](uint64_t seed) { few_cores(allowed_cpus() + 1, seed); }},
      {"cores: the most urgent first", urgent_first},
      {"worker: jobs in order, one at a time", in_order_one_at_a_time},
      {"worker: goes on while second parts block", blocked_second_parts},
      {"worker: jobs given from second parts", given_from_second_parts},
      {"worker: default floating-point environment", default_float_environment},
  };
}

}  // namespace flashmoe::testing
