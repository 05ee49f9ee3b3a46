// Races, uninitialised reads and bounds: wrong kernels that the emulator must catch, and right ones
// beside them.
#include "kernels/device/barrier.h"
#include "kernels/device/clock.h"
#include "kernels/device/identity.h"
#include "kernels/device/memory_order.h"
#include "kernels/device/warp.h"
#include "tests/emulator/cases.h"

namespace flashmoe::testing {
namespace {

using device::Scope;
using emulator::GlobalMemory;

template <typename T>
T* shared_array() {
  return reinterpret_cast<T*>(device::shared_memory());
}

void neighbours(uint64_t seed) {
  const Trial trial{.launch = {.blocks = 2, .threads = 128, .shared_bytes = 512}};
  GlobalMemory out(2 * 128 * 4, "out");
  const auto kernel = [&](bool synchronised) {
    return [&out, synchronised] {
      const int me = device::thread_index();
      shared_array<int>()[me] = me;
      if (synchronised) device::block_sync();
      out.as<int>()[device::block_index() * 128 + me] = shared_array<int>()[(me + 64) % 128];
    };
  };
  passes(seed, trial, kernel(true));
  check(out.values<int>()[3] == 67, "value");
  is_caught(seed, trial, {"shared memory of block", "warp"}, kernel(false));
}

// Lanes of a warp are threads like others.
void lanes(uint64_t seed) {
  const Trial trial{.launch = {.threads = 32, .shared_bytes = 256}};
  const auto kernel = [](int how) {
    return [how] {
      const int lane = device::lane_index();
      shared_array<int>()[lane] = lane;
      if (how == 0) device::warp_sync();
      if (how == 1) device::shuffle(lane, 0);
      shared_array<int>()[32 + lane] = shared_array<int>()[lane ^ 1];
    };
  };
  passes(seed, trial, kernel(0));
  is_caught(seed, trial, {"race: block 0 warp 0 lane", "which block 0 warp 0 lane", "wrote"},
            kernel(1));
}

// Threads that write different bytes of a word do not conflict; those that write the same do.
void halves(uint64_t seed) {
  const Trial trial{.launch = {.threads = 64, .shared_bytes = 256}};
  passes(seed, trial, [] {
    const int me = device::thread_index();
    shared_array<uint16_t>()[me] = static_cast<uint16_t>(me);
    device::block_sync();
    const uint32_t two = shared_array<uint32_t>()[me / 2];
    device::block_sync();
    shared_array<uint16_t>()[me ^ 1] = static_cast<uint16_t>(two);
  });
  is_caught(seed, trial, {"race:", "writes byte"},
            [] { shared_array<uint16_t>()[device::thread_index() / 2] = 1; });
  is_caught(seed, trial, {"race:", "nothing orders them"}, [] {
    const int me = device::thread_index();
    shared_array<uint16_t>()[me] = 1;
    device::block_sync();
    const uint32_t two = shared_array<uint32_t>()[me / 2];
    device::warp_sync();
    shared_array<uint16_t>()[(me + 32) % 64] = static_cast<uint16_t>(two);
  });
}

// Block 0 passes data to block 1 by a flag.
struct Message {
  GlobalMemory data{64 * 4, "data"};
  GlobalMemory flag{4, "flag"};
  GlobalMemory out{4, "out"};

  Trial trial(std::vector<int> gpus = {}) {
    return {.launch = {.blocks = 2, .threads = 64, .gpu_of_block = std::move(gpus)},
            .prepare = [this] { flag.fill(std::byte{0}); }};
  }
};

template <Scope kScope>
void wait_relaxed(const uint32_t* flag, uint32_t value) {
  while (device::load_relaxed<kScope>(flag) < value) device::sleep(50);
}
template <Scope kScope>
void wait_acquire(const uint32_t* flag, uint32_t value) {
  while (device::load_acquire<kScope>(flag) < value) device::sleep(50);
}

enum class Missing { kNothing, kBarrier, kReleaseFence, kAcquireFence, kWarpSync };

template <Scope kWrite, Scope kRead>
Kernel message_kernel(Message& message, Missing missing) {
  return [&message, missing] {
    uint32_t* data = message.data.as<uint32_t>();
    uint32_t* flag = message.flag.as<uint32_t>();
    const int me = device::thread_index();
    if (device::block_index() == 0) {
      data[me] = 7;
      if (missing != Missing::kBarrier) device::block_sync();
      if (me == 0) {
        if (missing != Missing::kReleaseFence) device::fence<kWrite>();
        device::store_relaxed<kWrite>(flag, 1u);
      }
    } else if (device::warp_index() == 0) {
      if (me == 0) {
        wait_relaxed<kRead>(flag, 1);
        if (missing != Missing::kAcquireFence) device::fence<kRead>();
      }
      if (missing == Missing::kWarpSync) {
        device::shuffle(0, 0);
      } else {
        device::warp_sync();
      }
      if (data[me] + data[63 - me] == 14 && me == 0) *message.out.as<uint32_t>() = 14;
    }
  };
}

void messages(uint64_t seed) {
  Message message;
  constexpr Scope kGpu = Scope::kGpu, kSystem = Scope::kSystem;
  passes(seed, message.trial(), message_kernel<kGpu, kGpu>(message, Missing::kNothing));
  check(message.out.values<uint32_t>()[0] == 14, "the message arrived");
  for (const Missing missing :
       {Missing::kBarrier, Missing::kReleaseFence, Missing::kAcquireFence, Missing::kWarpSync}) {
    is_caught(seed, message.trial(), {"race: block 1 warp 0 lane", "'data', which block 0 warp"},
              message_kernel<kGpu, kGpu>(message, missing));
  }
  // On two GPUs.
  passes(seed, message.trial({0, 1}), message_kernel<kSystem, kSystem>(message, Missing::kNothing));
  is_caught(seed, message.trial({0, 1}), {"race: block 1"},
            message_kernel<kGpu, kSystem>(message, Missing::kNothing));
  is_caught(seed, message.trial({0, 1}), {"race: block 1"},
            message_kernel<kSystem, kGpu>(message, Missing::kNothing));
  passes(seed, message.trial({1, 1}), message_kernel<kGpu, kGpu>(message, Missing::kNothing));
}

// Many add to a counter, one waits for all of them; the additions go on with each other's release.
void counters(uint64_t seed) {
  GlobalMemory data(6 * 4, "data"), count(4, "count");
  const Trial trial{.launch = {.blocks = 6, .threads = 32},
                    .prepare = [&] { count.fill(std::byte{0}); }};
  const auto kernel = [&](bool released, bool acquired) {
    return [&, released, acquired] {
      if (device::thread_index() != 0) return;
      uint32_t* data_words = data.as<uint32_t>();
      if (device::block_index() != 0) {
        data_words[device::block_index()] = 1;
        if (released) device::fence<Scope::kGpu>();
        device::add_relaxed<Scope::kGpu>(count.as<uint32_t>(), 1u);
        return;
      }
      if (acquired) {
        wait_acquire<Scope::kGpu>(count.as<uint32_t>(), 5);
      } else {
        wait_relaxed<Scope::kGpu>(count.as<uint32_t>(), 5);
      }
      uint32_t sum = 0;
      for (int i = 1; i < 6; ++i) sum += data_words[i];
      data_words[0] = sum;
    };
  };
  passes(seed, trial, kernel(true, true));
  check(data.values<uint32_t>()[0] == 5, "the sum");
  is_caught(seed, trial, {"race: block 0", "'data'"}, kernel(false, true));
  is_caught(seed, trial, {"race: block 0", "'data'"}, kernel(true, false));
  // A store in between begins anew: what was released before is not part of it.
  is_caught_sometimes(seed, trial, {"race: block 0", "'data', which block 1"}, [&] {
    if (device::thread_index() != 0) return;
    uint32_t* words = data.as<uint32_t>();
    uint32_t* number = count.as<uint32_t>();
    if (device::block_index() == 1) {
      words[1] = 1;
      device::store_release<Scope::kGpu>(number, 1u);
    } else if (device::block_index() == 2) {
      wait_relaxed<Scope::kGpu>(number, 1);
      device::store_relaxed<Scope::kGpu>(number, 2u);
    } else if (device::block_index() == 0) {
      wait_acquire<Scope::kGpu>(number, 2);
      words[0] = words[1];
    }
  });
}

// What one has seen, it passes on.
void chains(uint64_t seed) {
  GlobalMemory data(4, "data"), flags(16, "flags");
  const Trial trial{.launch = {.blocks = 4, .threads = 32},
                    .prepare = [&] { flags.fill(std::byte{0}); }};
  const auto kernel = [&](bool acquires) {
    return [&, acquires] {
      if (device::thread_index() != 0) return;
      uint32_t* flag = flags.as<uint32_t>();
      const int me = device::block_index();
      if (me == 0) {
        *data.as<uint32_t>() = 3;
      } else if (acquires || me != 2) {
        wait_acquire<Scope::kGpu>(&flag[me - 1], 1);
      } else {
        wait_relaxed<Scope::kGpu>(&flag[me - 1], 1);
      }
      if (me == 3) {
        *data.as<uint32_t>() += 1;
      } else {
        device::store_release<Scope::kGpu>(&flag[me], 1u);
      }
    };
  };
  passes(seed, trial, kernel(true));
  is_caught(seed, trial, {"race: block 3", "which block 0 warp 0 lane 0 wrote"}, kernel(false));
}

void plain_beside_atomic(uint64_t seed) {
  GlobalMemory word(4, "word");
  const Trial trial{.launch = {.threads = 64}, .prepare = [&] { word.fill(std::byte{0}); }};
  is_caught_sometimes(seed, trial, {"race:", "'word'"}, [&] {
    if (device::thread_index() == 0) *word.as<uint32_t>() = 1;
    if (device::thread_index() == 32) device::load_acquire<Scope::kGpu>(word.as<uint32_t>());
  });
  is_caught(seed, trial, {"race:", "'word'"}, [&] {
    if (device::thread_index() == 0) *word.as<uint32_t>() = 1;
    if (device::thread_index() == 32) device::add_relaxed<Scope::kGpu>(word.as<uint32_t>(), 1u);
  });
  passes(seed, trial, [&] {
    if (device::thread_index() == 0) *word.as<uint32_t>() = 1;
    device::block_sync();
    device::add_relaxed<Scope::kGpu>(word.as<uint32_t>(), 1u);
    device::block_sync();
    if (*word.as<uint32_t>() != 65) device::barrier_sync(device::Barrier::kMath, 1024);
  });
}

void uninitialised(uint64_t seed) {
  GlobalMemory in(64, "in"), out(64, "out");
  in.mark_written(0, 60);
  const Trial trial{.launch = {.threads = 32, .shared_bytes = 256}};
  is_caught(seed, trial, {"uninitialised: block 0 warp 0 lane 15 reads byte 60 of 'in'"}, [&] {
    const int me = device::thread_index();
    if (me < 16) out.as<uint32_t>()[me] = in.as<uint32_t>()[me];
  });
  passes(seed, trial, [&] {
    const int me = device::thread_index();
    if (me < 15) out.as<uint32_t>()[me] = in.as<uint32_t>()[me];
  });
  // Shared memory does not keep what an earlier launch wrote.
  passes(seed, trial, [] { shared_array<int>()[device::thread_index()] = 1; });
  is_caught(seed, trial, {"uninitialised:", "shared memory of block 0"},
            [&] { out.as<int>()[0] = shared_array<int>()[0]; });
  is_caught(seed, trial, {"uninitialised:", "byte 3 of shared memory"}, [&] {
    for (int i = 0; i < 3; ++i) shared_array<uint8_t>()[device::thread_index() * 4 + i] = 1;
    device::block_sync();
    out.as<int>()[device::thread_index() % 16] = shared_array<int>()[0];
  });
}

void bounds(uint64_t seed) {
  GlobalMemory out(64, "out");
  const GlobalMemory constant(64, "constant", GlobalMemory::Use::kConstant);
  GlobalMemory place(8, "place");
  const Trial trial{.launch = {.blocks = 2, .threads = 32, .shared_bytes = 256},
                    .prepare = [&] { place.fill(std::byte{0}); }};
  passes(seed, trial, [&] {
    if (device::block_index() == 0 && device::thread_index() < 16) {
      out.as<int>()[device::thread_index()] = 1;
    }
  });
  is_caught(seed, trial, {"out of bounds: block", "lane 16 writes 4 bytes at byte 64 of 'out'"},
            [&] {
              if (device::thread_index() == 16) out.as<int>()[device::thread_index()] = 1;
            });
  is_caught(seed, trial, {"out of bounds:", "byte 256 of shared memory", "has 256 bytes"},
            [] { shared_array<int>()[64] = 1; });
  is_caught(seed, trial, {"out of bounds: block 1", "of block 0, which is not its own CTA's"}, [&] {
    if (device::thread_index() != 0) return;
    if (device::block_index() == 0) {
      device::store_release<Scope::kGpu>(
          place.as<uint64_t>(), uint64_t{reinterpret_cast<uintptr_t>(device::shared_memory())});
      return;
    }
    uint64_t address = 0;
    while ((address = device::load_acquire<Scope::kGpu>(place.as<uint64_t>())) == 0) {
      device::sleep(50);
    }
    *reinterpret_cast<std::byte*>(address) = std::byte{0};
  });
  is_caught(seed, trial, {"'constant', which is constant"}, [&] { constant.as<int>()[3] = 1; });
  is_caught(seed, trial, {"where global memory is needed"},
            [] { device::store_relaxed<Scope::kGpu>(shared_array<uint32_t>(), 1u); });
  is_caught(seed, trial, {"not aligned"}, [&] {
    device::store_relaxed<Scope::kGpu>(reinterpret_cast<uint64_t*>(out.data() + 4), uint64_t{1});
  });
}

}  // namespace

std::vector<Case> ordering_cases() {
  return {
      {"threads of a CTA", neighbours},
      {"lanes of a warp", lanes},
      {"parts of words", halves},
      {"a message by fences and a flag", messages},
      {"a counter that many add to", counters},
      {"a chain of flags", chains},
      {"plain beside atomic accesses", plain_beside_atomic},
      {"uninitialised memory", uninitialised},
      {"bounds", bounds},
  };
}

}  // namespace flashmoe::testing
