// The scheduler: schedules that differ and that repeat, deadlocks, virtual time.
#include <set>
#include <stdexcept>

#include "kernels/device/async_copy.h"
#include "kernels/device/barrier.h"
#include "kernels/device/clock.h"
#include "kernels/device/identity.h"
#include "kernels/device/mbarrier.h"
#include "kernels/device/memory_order.h"
#include "tests/emulator/cases.h"

namespace flashmoe::testing {
namespace {

using device::Scope;
using emulator::GlobalMemory;
using emulator::Outcome;

// Takes tickets, and writes down who took which.
struct Tickets {
  GlobalMemory next{4, "next"};
  GlobalMemory taken{64 * 4, "taken"};

  std::vector<uint32_t> run(uint64_t seed, Outcome* outcome = nullptr) {
    next.fill(std::byte{0});
    const Outcome result =
        emulator::launch({.blocks = 4, .threads = 64, .shared_bytes = 256, .seed = seed}, [&] {
          uint32_t* number = next.as<uint32_t>();
          if (device::lane_index() % 4 != 0) return;
          const uint32_t ticket = device::fetch_add_relaxed<Scope::kGpu>(number, 1u);
          device::sleep(100);
          taken.as<uint32_t>()[ticket] =
              static_cast<uint32_t>(device::block_index() * 64 + device::thread_index());
        });
    if (outcome) *outcome = result;
    const auto values = taken.values<uint32_t>();
    return {values.begin(), values.end()};
  }
};

void repeats(uint64_t seed) {
  Tickets tickets;
  std::set<std::vector<uint32_t>> orders;
  for (uint64_t i = 0; i < 40; ++i) {
    Outcome first{}, second{};
    const std::vector<uint32_t> order = tickets.run(seed * 100 + i, &first);
    check(tickets.run(seed * 100 + i, &second) == order, "the same seed, the same run");
    check(first.schedule == second.schedule && first.steps == second.steps &&
              first.nanoseconds == second.nanoseconds,
          "the same schedule");
    orders.insert(order);
  }
  check(orders.size() >= 25, "only " + std::to_string(orders.size()) + " of 40 seeds differ");
}

// Two warps meet in either order, and a warp is overtaken in the middle.
void interleavings(uint64_t seed) {
  GlobalMemory words(8, "words");
  std::set<uint64_t> seen;
  for (uint64_t i = 0; i < 600; ++i) {
    words.fill(std::byte{0});
    emulator::launch({.threads = 64, .seed = seed * 1000 + i}, [&] {
      if (device::lane_index() != 0) return;
      uint32_t* word = words.as<uint32_t>();
      const int me = device::warp_index();
      for (int step = 0; step < 3; ++step) {
        const uint32_t value = device::load_relaxed<Scope::kGpu>(word);
        device::store_relaxed<Scope::kGpu>(word, value * 4 + 1 + static_cast<uint32_t>(me));
      }
    });
    seen.insert(words.values<uint32_t>()[0]);
  }
  check(seen.size() >= 20, "only " + std::to_string(seen.size()) + " interleavings");
}

void messages_repeat(uint64_t seed) {
  GlobalMemory word(4, "word");
  const emulator::Launch launch{.blocks = 4, .threads = 64, .seed = seed};
  const auto kernel = [&] { word.as<uint32_t>()[0] = 1; };
  const std::string first = complaint(launch, kernel);
  check_contains(first, {"race:"});
  check(complaint(launch, kernel) == first, "the same message");
}

void deadlocks(uint64_t seed) {
  emulator::name_shared_memory(0, 16, 8, "full");
  is_caught(seed, {.launch = {.blocks = 2, .threads = 128, .shared_bytes = 64}},
            {"deadlock", "block 1 warps 1-2: mbarrier full[1] in shared memory of block 1 parity 0",
             "(phase 0: 3 of 3 arrivals and 0 bytes missing)",
             "block 1 warp 3 lane 31: barrier 0, to which 1 of 128 threads came"},
            [] {
              auto* full = reinterpret_cast<device::Mbarrier*>(device::shared_memory());
              if (device::thread_index() == 0) device::mbarrier_init(&full[1], 3);
              device::block_sync();
              if (device::block_index() == 0) return;
              const int warp = device::warp_index();
              if (warp == 1 || warp == 2) device::mbarrier_wait(&full[1], 0);
              if (device::thread_index() == 127) device::block_sync();
            });
  emulator::forget_shared_names();
}

// A wait with a deadline ends, however long that is, without taking long.
void deadlines(uint64_t seed) {
  GlobalMemory flag(4, "flag"), late(4, "late");
  for (const uint64_t deadline : {uint64_t{10'000}, uint64_t{10'000'000'000}}) {
    passes(seed,
           {.launch = {.blocks = 4, .threads = 64},
            .prepare =
                [&] {
                  flag.fill(std::byte{0});
                  late.fill(std::byte{0});
                }},
           [&] {
             if (device::lane_index() != 0) return;
             const uint64_t begin = device::nanoseconds();
             while (device::load_acquire<Scope::kGpu>(flag.as<uint32_t>()) == 0) {
               device::sleep(100);
               if (device::nanoseconds() - begin < deadline) continue;
               device::add_relaxed<Scope::kGpu>(late.as<uint32_t>(), 1u);
               return;
             }
           });
    check(late.values<uint32_t>()[0] == 8, "all ended late");
  }
  const emulator::Launch forever{
      .blocks = 2, .threads = 32, .seed = seed, .max_nanoseconds = 1'000'000'000};
  check_contains(complaint(forever,
                           [&] {
                             flag.as<uint32_t>();
                             while (device::load_acquire<Scope::kGpu>(flag.as<uint32_t>()) == 0) {
                             }
                           }),
                 {"virtual time limit", "block 1 warp 0: sleep or poll in an atomic load"});
  check_contains(complaint({.threads = 32, .seed = seed, .max_steps = 10'000},
                           [&] {
                             for (;;) {
                               device::add_relaxed<Scope::kGpu>(late.as<uint32_t>(), 1u);
                             }
                           }),
                 {"more than 10000 steps"});
}

// No wait that somebody is to end runs into a deadline of a millisecond, whatever is starved.
void nobody_starves(uint64_t seed) {
  GlobalMemory flags(16 * 4, "flags"), late(4, "late");
  passes(seed,
         {.launch = {.blocks = 16, .threads = 128},
          .prepare =
              [&] {
                flags.fill(std::byte{0});
                late.fill(std::byte{0});
              }},
         [&] {
           uint32_t* flag = flags.as<uint32_t>();
           const int me = device::block_index();
           if (device::thread_index() == 0) {
             if (me > 0) {
               const uint64_t begin = device::nanoseconds();
               while (device::load_acquire<Scope::kGpu>(&flag[me - 1]) == 0) {
                 device::sleep(64);
                 if (device::nanoseconds() - begin > 1'000'000) {
                   device::store_relaxed<Scope::kGpu>(late.as<uint32_t>(), 1u);
                 }
               }
             }
             device::store_release<Scope::kGpu>(&flag[me], 1u);
           }
           device::block_sync();
         });
  check(late.values<uint32_t>()[0] == 0, "a deadline passed");
}

void many_threads(uint64_t seed) {
  GlobalMemory sum(4, "sum");
  passes(seed,
         {.launch = {.blocks = 16, .threads = 384, .shared_bytes = 4096},
          .prepare = [&] { sum.fill(std::byte{0}); },
          .seeds = 5},
         [&] {
           for (int i = 0; i < 4; ++i) device::block_sync();
           device::add_relaxed<Scope::kGpu>(sum.as<uint32_t>(), 1u);
         });
  check(sum.values<uint32_t>()[0] == 16 * 384, "all threads ran");
}

void exceptions(uint64_t seed) {
  std::string message;
  try {
    emulator::launch({.blocks = 2, .threads = 64, .seed = seed}, [] {
      if (device::thread_index() == 33) throw std::runtime_error("from a thread");
      device::block_sync();
    });
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  check(message == "from a thread", "what a kernel throws comes out");
  bool refused = false;
  try {
    emulator::launch({.blocks = 1, .threads = 40, .seed = seed}, [] {});
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  check(refused, "a launch of 40 threads");
}

// Kernels of a stream follow each other; those of different GPUs do not.
void next_kernels(uint64_t seed) {
  GlobalMemory words(4 * 64 * 4, "words");
  const auto write_own = [&] {
    const int me = device::block_index() * 64 + device::thread_index();
    words.as<int>()[me] = me;
  };
  const auto read_next_block = [&] {
    const int other = (device::block_index() + 1) % 4 * 64 + device::thread_index();
    if (words.as<int>()[other] != other) throw std::runtime_error("not what the kernel wrote");
  };
  const auto use_shared = [&] {
    auto* barrier = reinterpret_cast<device::Mbarrier*>(device::shared_memory());
    if (device::thread_index() == 0) device::mbarrier_init(barrier, 64);
    device::block_sync();
    device::mbarrier_arrive(barrier);
    device::mbarrier_wait(barrier, 0);
    device::shared_memory()[64 + device::thread_index()] = std::byte{1};
  };
  Trial trial{.launch = {.blocks = 4, .threads = 64, .shared_bytes = 2048}};
  passes(seed, trial, [&] {
    use_shared();
    write_own();
    emulator::next_kernel();
    use_shared();
    read_next_block();
  });
  is_caught(seed, trial, {"race", "'words'"}, [&] {
    write_own();
    read_next_block();
    emulator::next_kernel();
  });
  is_caught(seed, trial, {"uninitialised", "shared memory"}, [&] {
    use_shared();
    emulator::next_kernel();
    words.as<int>()[0] = static_cast<int>(device::shared_memory()[64]);
  });
  is_caught(seed, trial, {"deadlock", "next_kernel"}, [&] {
    if (device::block_index() == 0) {
      if (device::thread_index() == 0) emulator::next_kernel();
    } else {
      emulator::next_kernel();
    }
    for (uint32_t* never = words.as<uint32_t>(); device::block_index() == 0;) {
      if (device::load_relaxed<Scope::kGpu>(never) == 7) return;
      device::block_sync();
    }
  });
  is_caught_sometimes(seed, trial, {"copies to", "in flight"}, [&] {
    auto* barrier = reinterpret_cast<device::Mbarrier*>(device::shared_memory());
    if (device::thread_index() == 0) device::mbarrier_init(barrier, 65);
    device::block_sync();
    device::async_copy_16(device::shared_memory() + 64 + 16 * device::thread_index(), words.data(),
                          0);
    device::async_copy_arrive(barrier);
    emulator::next_kernel();
  });
  trial.launch.gpu_of_block = {0, 0, 1, 1};
  is_caught(seed, trial, {"race", "'words'"}, [&] {
    write_own();
    emulator::next_kernel();
    read_next_block();
  });
}

}  // namespace

std::vector<Case> schedule_cases() {
  return {
      {"a seed repeats its schedule", repeats},
      {"seeds interleave differently", interleavings},
      {"a seed repeats its message", messages_repeat},
      {"deadlocks", deadlocks},
      {"deadlines", deadlines},
      {"nobody starves", nobody_starves},
      {"many threads", many_threads},
      {"kernels of a stream", next_kernels},
      {"exceptions", exceptions},
  };
}

}  // namespace flashmoe::testing
