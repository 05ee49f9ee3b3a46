// mbarriers, async_copy_16 and tma_load, used rightly and wrongly.
#include <algorithm>
#include <numeric>

#include "kernels/device/async_copy.h"
#include "kernels/device/barrier.h"
#include "kernels/device/identity.h"
#include "kernels/device/mbarrier.h"
#include "kernels/device/memory_order.h"
#include "kernels/device/tma.h"
#include "tests/emulator/cases.h"

namespace flashmoe::testing {
namespace {

using device::Mbarrier;
using emulator::GlobalMemory;

constexpr int kStages = 2;
constexpr int kRounds = 6;  // stages that are filled

struct Stages {
  alignas(1024) float data[kStages][8][32];  // a box: 8 lines of 128 bytes
  Mbarrier full[kStages];
  Mbarrier empty[kStages];
};
static_assert(sizeof(Stages) == 3072);

Stages& stages() { return *reinterpret_cast<Stages*>(device::shared_memory()); }

void load_box(void* shared, const emulator::TensorMap& map, Mbarrier* barrier, int x, int y,
              int z) {
  const device::TensorMap opaque = device::TensorMap::from(map);
  device::tma_load(shared, &opaque, barrier, x, y, z);
}

enum class Fault {
  kNone,
  kNoWaitForFull,   // the consumer reads without waiting
  kNoWaitForEmpty,  // the producer overwrites without waiting
  kNoInitBarrier,   // no barrier after mbarrier_init
  kNoInitFence,     // nor fence_mbarrier_init
  kTooManyBytes,    // the copy is larger than expected
  kTooFewBytes,
  kNoInit,
  kReleasesEarly,  // the consumer releases before it reads
};

void init_stages(Fault fault, uint32_t producers, uint32_t consumers) {
  if (device::thread_index() == 0 && fault != Fault::kNoInit) {
    for (int i = 0; i < kStages; ++i) {
      device::mbarrier_init(&stages().full[i], producers);
      device::mbarrier_init(&stages().empty[i], consumers);
    }
    if (fault != Fault::kNoInitFence) device::fence_mbarrier_init();
  }
  if (fault != Fault::kNoInitBarrier) device::block_sync();
}

// The consumer's warp adds up what is in the stages.
void consume(Fault fault, float* out) {
  const int lane = device::lane_index();
  float sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    const int stage = round % kStages;
    const uint32_t parity = static_cast<uint32_t>(round / kStages % 2);
    if (fault != Fault::kNoWaitForFull) device::mbarrier_wait(&stages().full[stage], parity);
    if (fault == Fault::kReleasesEarly) device::mbarrier_arrive(&stages().empty[stage]);
    for (int line = 0; line < 8; ++line) {
      // Chunk c of a line is at c ^ line.
      sum += stages().data[stage][line][(lane / 4 ^ line) * 4 + lane % 4];
    }
    if (fault != Fault::kReleasesEarly) device::mbarrier_arrive(&stages().empty[stage]);
  }
  out[lane] = sum;
}

void wait_for_empty(Fault fault, int round) {
  if (fault == Fault::kNoWaitForEmpty || round < kStages) return;
  device::mbarrier_wait(&stages().empty[round % kStages],
                        static_cast<uint32_t>(round / kStages - 1) % 2);
}

struct Source {
  GlobalMemory in;
  GlobalMemory out{128, "out"};
  emulator::TensorMap map;

  Source()
      : in(emulator::global_memory("in", numbers())),
        map{.base = in.data(),
            .element_bytes = 4,
            .size = {32, 8, kRounds},
            .stride = {128, 1024},
            .box = {32, 8, 1}} {}

  static std::vector<float> numbers() {
    std::vector<float> values(kRounds * 8 * 32);
    std::iota(values.begin(), values.end(), 1.0f);
    return values;
  }
  void check_sums() const {
    for (size_t lane = 0; lane < 32; ++lane) {
      float want = 0;
      for (size_t i = lane; i < kRounds * 8 * 32; i += 32) want += numbers()[i];
      check(out.values<float>()[lane] == want, "sum");
    }
  }
};

Kernel tma_kernel(Source& source, Fault fault) {
  return [&source, fault] {
    init_stages(fault, 1, 32);
    if (device::warp_index() == 1) {
      consume(fault, source.out.as<float>());
    } else if (device::thread_index() == 0) {
      for (int round = 0; round < kRounds; ++round) {
        Mbarrier* full = &stages().full[round % kStages];
        wait_for_empty(fault, round);
        const uint32_t bytes = fault == Fault::kTooManyBytes  ? 512
                               : fault == Fault::kTooFewBytes ? 2048
                                                              : 1024;
        device::mbarrier_arrive_expect(full, bytes);
        load_box(stages().data[round % kStages], source.map, full, 0, 0, round);
      }
    }
  };
}

void tma(uint64_t seed) {
  Source source;
  const Trial trial{.launch = {.threads = 64, .shared_bytes = sizeof(Stages)}};
  passes(seed, trial, tma_kernel(source, Fault::kNone));
  source.check_sums();
  const auto caught = [&](Fault fault, const std::vector<std::string>& parts) {
    is_caught(seed, trial, parts, tma_kernel(source, fault));
  };
  is_caught_sometimes(seed, trial, {"shared memory of block 0"},
                      tma_kernel(source, Fault::kNoWaitForFull));
  caught(Fault::kNoWaitForEmpty, {"shared memory of block 0"});
  caught(Fault::kReleasesEarly, {"race: an asynchronous copy", "which block 0 warp 1", "read"});
  caught(Fault::kNoInitBarrier, {"mbarrier_", "shared memory of block 0"});
  caught(Fault::kNoInit, {"mbarrier misuse:", "was not initialised"});
  caught(Fault::kNoInitFence, {"TMA misuse:", "without fence_mbarrier_init"});
  caught(Fault::kTooManyBytes, {"misuse:", "byte"});
  caught(Fault::kTooFewBytes, {"deadlock", "block 0 warp 1: mbarrier", "1024 bytes missing"});
}

void tma_boxes(uint64_t seed) {
  Source source;
  const Trial trial{.launch = {.threads = 32, .shared_bytes = sizeof(Stages)}};
  GlobalMemory out(1024, "box");
  const auto load = [&](emulator::TensorMap map, size_t to, int x, int y, int z) {
    return [&out, map, to, x, y, z] {
      init_stages(Fault::kNone, 1, 1);
      Mbarrier* full = &stages().full[0];
      if (device::thread_index() == 0) {
        device::mbarrier_arrive_expect(full, 1024);
        load_box(device::shared_memory() + to, map, full, x, y, z);
      }
      device::mbarrier_wait(full, 0);
      for (int i = device::thread_index(); i < 256; i += 32) {
        out.as<float>()[i] = stages().data[0][i / 32][i % 32];
      }
    };
  };
  // Half of the box lies outside on each side.
  passes(seed, trial, load(source.map, 0, -16, 4, 1));
  for (size_t line = 0; line < 8; ++line) {
    for (size_t column = 0; column < 32; ++column) {
      const bool inside = column >= 16 && line < 4;
      const size_t index = line * 32 + (column / 4 ^ line) * 4 + column % 4;
      const float want =
          inside ? static_cast<float>(256 + (line + 4) * 32 + column - 16 + 1) : 0.0f;
      check(out.values<float>()[index] == want, "an element of the box");
    }
  }
  is_caught(seed, trial, {"TMA misuse:", "not a multiple of 1024"}, load(source.map, 128, 0, 0, 0));
  emulator::TensorMap map = source.map;
  map.stride[0] = 120;
  is_caught(seed, trial, {"TMA misuse:", "stride"}, load(map, 0, 0, 0, 0));
  map = source.map;
  map.size[2] = kRounds + 1;
  is_caught(seed, trial, {"out of bounds:", "of 'in'"}, load(map, 0, 0, 0, kRounds));
  const GlobalMemory fresh(8192, "fresh");
  map = source.map;
  map.base = fresh.data();
  is_caught(seed, trial, {"uninitialised: an asynchronous copy", "of 'fresh'"},
            load(map, 0, 0, 0, 0));
}

Kernel copy_kernel(Source& source, Fault fault) {
  return [&source, fault] {
    init_stages(fault, 32, 32);
    const int lane = device::lane_index();
    if (device::warp_index() == 1) {
      consume(fault, source.out.as<float>());
      return;
    }
    for (int round = 0; round < kRounds; ++round) {
      const int stage = round % kStages;
      wait_for_empty(fault, round);
      for (int i = lane; i < 64; i += 32) {
        const int line = i / 8, chunk = i % 8;
        device::async_copy_16(&stages().data[stage][line][(chunk ^ line) * 4],
                              source.in.as<float>() + (round * 64 + i) * 4, 16);
      }
      device::async_copy_arrive(&stages().full[stage]);
    }
  };
}

void async_copies(uint64_t seed) {
  Source source;
  const Trial trial{.launch = {.threads = 64, .shared_bytes = sizeof(Stages)}};
  passes(seed, trial, copy_kernel(source, Fault::kNone));
  source.check_sums();
  is_caught_sometimes(seed, trial, {"shared memory of block 0"},
                      copy_kernel(source, Fault::kNoWaitForFull));
  is_caught(seed, trial, {"shared memory of block 0"}, copy_kernel(source, Fault::kNoWaitForEmpty));
  is_caught(seed, trial, {"race: an async_copy_16 of block 0 warp 0", "read"},
            copy_kernel(source, Fault::kReleasesEarly));
  // The thread that copies must wait, too.
  is_caught(seed, trial, {"read early: block 0 warp 0 lane 0", "an async_copy_16 of block 0"}, [&] {
    if (device::thread_index() != 0) return;
    device::async_copy_16(stages().data[0], source.in.data(), 16);
    source.out.as<float>()[0] = stages().data[0][0][0];
  });
  // What is not copied is zeros.
  passes(seed, trial, [&] {
    init_stages(Fault::kNone, 1, 1);
    if (device::thread_index() != 0) return;
    device::async_copy_16(stages().data[0], source.in.data(), 4);
    device::async_copy_16(stages().data[0][0] + 4, nullptr, 0);
    device::async_copy_arrive(&stages().full[0]);
    device::mbarrier_wait(&stages().full[0], 0);
    for (int i = 0; i < 8; ++i) source.out.as<float>()[i] = stages().data[0][0][i];
  });
  check(source.out.values<float>()[0] == 1 && source.out.values<float>()[1] == 0 &&
            source.out.values<float>()[7] == 0,
        "zeros");
  is_caught(seed, trial, {"misaligned:"},
            [&] { device::async_copy_16(stages().data[0][0] + 1, source.in.data(), 16); });
}

// What the generic proxy wrote, tma_load may read after a fence_proxy_async by the writer or by the
// one who issues.
void proxies(uint64_t seed) {
  enum class Fence { kNone, kWriter, kReader, kBeforeWrite };
  GlobalMemory data(1024, "data"), flag(4, "flag"), out(128, "out");
  const emulator::TensorMap map{.base = data.data(),
                                .element_bytes = 4,
                                .size = {32, 8, 1},
                                .stride = {128, 1024},
                                .box = {32, 8, 1}};
  const Trial trial{.launch = {.blocks = 2, .threads = 32, .shared_bytes = sizeof(Stages)},
                    .prepare = [&] { flag.fill(std::byte{0}); }};
  const auto kernel = [&](Fence fence) {
    return [&, fence] {
      using device::Scope;
      const int lane = device::lane_index();
      if (device::block_index() == 0) {
        if (fence == Fence::kBeforeWrite) device::fence_proxy_async();
        for (int i = lane; i < 256; i += 32) data.as<float>()[i] = 1;
        if (fence == Fence::kWriter) device::fence_proxy_async();
        device::warp_sync();
        if (lane == 0) device::store_release<Scope::kGpu>(flag.as<uint32_t>(), 1u);
        return;
      }
      init_stages(Fault::kNone, 1, 1);
      Mbarrier* full = &stages().full[0];
      if (lane == 0) {
        while (device::load_acquire<Scope::kGpu>(flag.as<uint32_t>()) == 0) {
        }
        if (fence == Fence::kReader) device::fence_proxy_async();
        device::mbarrier_arrive_expect(full, 1024);
        load_box(stages().data, map, full, 0, 0, 0);
      }
      device::mbarrier_wait(full, 0);
      out.as<float>()[lane] = stages().data[0][0][lane];
    };
  };
  passes(seed, trial, kernel(Fence::kWriter));
  passes(seed, trial, kernel(Fence::kReader));
  for (const Fence fence : {Fence::kNone, Fence::kBeforeWrite}) {
    is_caught(seed, trial,
              {"proxy: an asynchronous copy", "of 'data'", "fence_proxy_async is missing"},
              kernel(fence));
  }
  data.fill(std::byte{0});
  // Nor may it overwrite what the generic proxy wrote.
  is_caught(seed, trial, {"proxy: an asynchronous copy", "writes", "shared memory of block"}, [&] {
    stages().data[0][0][device::lane_index()] = 0;
    init_stages(Fault::kNone, 1, 1);
    if (device::thread_index() != 0) return;
    device::fence_proxy_async();
    stages().data[0][1][0] = 0;
    device::mbarrier_arrive_expect(&stages().full[0], 1024);
    load_box(stages().data, map, &stages().full[0], 0, 0, 0);
  });
}

void mbarrier_misuse(uint64_t seed) {
  const Trial trial{.launch = {.threads = 32, .shared_bytes = sizeof(Stages)}};
  is_caught(seed, trial, {"mbarrier misuse:", "more arrivals than the 1"}, [] {
    init_stages(Fault::kNone, 1, 1);
    if (device::thread_index() != 0) return;
    device::mbarrier_arrive_expect(&stages().full[0], 128);
    device::mbarrier_arrive(&stages().full[0]);
  });
  is_caught(seed, trial, {"mbarrier misuse:", "expect", "more than 2^20 - 1"}, [] {
    init_stages(Fault::kNone, 4, 1);
    if (device::thread_index() != 0) return;
    for (int i = 0; i < 3; ++i) device::mbarrier_arrive_expect(&stages().full[0], 1 << 19);
  });
  is_caught(seed, trial, {"mbarrier misuse:", "which is an mbarrier already"}, [] {
    init_stages(Fault::kNone, 1, 1);
    init_stages(Fault::kNone, 1, 1);
  });
  is_caught(seed, trial, {"mbarrier misuse:", "writes", "which is an mbarrier"}, [] {
    init_stages(Fault::kNone, 1, 1);
    stages().full[0].state = 0;
  });
  is_caught(seed, trial, {"mbarrier misuse:", "for 0 arrivals"},
            [] { init_stages(Fault::kNone, 0, 1); });
}

}  // namespace

std::vector<Case> async_copy_cases() {
  return {
      {"tma_load through stages", tma},
      {"boxes of tma_load", tma_boxes},
      {"async_copy_16 through stages", async_copies},
      {"the async proxy", proxies},
      {"misuse of mbarriers", mbarrier_misuse},
  };
}

}  // namespace flashmoe::testing
