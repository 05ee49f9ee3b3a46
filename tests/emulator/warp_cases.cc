// Barriers of a CTA and operations of a warp, used rightly and wrongly.
#include "kernels/device/barrier.h"
#include "kernels/device/identity.h"
#include "kernels/device/warp.h"
#include "tests/emulator/cases.h"

namespace flashmoe::testing {
namespace {

using device::Barrier;
using emulator::GlobalMemory;

void exchange(uint64_t seed) {
  GlobalMemory out(64 * 4 * 4, "out");
  passes(seed, {.launch = {.threads = 64}}, [&] {
    const int lane = device::lane_index();
    uint32_t* mine = out.as<uint32_t>() + device::thread_index() * 4;
    int sum = lane;
    for (int mask = 16; mask > 0; mask /= 2) sum += device::shuffle_xor(sum, mask);
    mine[0] = static_cast<uint32_t>(sum);
    mine[1] = device::ballot(lane % 3 == 0);
    mine[2] = device::match_any(static_cast<uint32_t>(lane / 8));
    mine[3] = device::any(device::warp_index() == 1 && lane == 5);
  });
  const auto values = out.values<uint32_t>();
  for (uint32_t i = 0; i < 64; ++i) {
    check(values[i * 4] == 496, "sum");
    check(values[i * 4 + 1] == 0x49249249, "ballot");
    check(values[i * 4 + 2] == 0xffu << i % 32 / 8 * 8, "match");
    check(values[i * 4 + 3] == i / 32, "any");
  }
}

void warp_misuse(uint64_t seed) {
  const Trial trial{.launch = {.threads = 64}};
  is_caught(seed, trial, {"warp misuse: block 0 warp 1 lane", "is at", "warp_sync", "shuffle"}, [] {
    if (device::thread_index() == 40) {
      device::warp_sync();
    } else {
      device::shuffle(1, 0);
    }
  });
  is_caught(seed, trial, {"block 0 warp 0 lane", "end", "warp_sync"}, [] {
    if (device::thread_index() != 3) device::warp_sync();
  });
  is_caught(seed, trial, {"shuffles from lane 32"}, [] { device::shuffle(1, 32); });
}

// Two groups of warps with a barrier each, while others go on.
void named_barriers(uint64_t seed) {
  GlobalMemory out(4 * 128, "out");
  passes(seed, {.launch = {.threads = 128, .shared_bytes = 512}}, [&] {
    int* values = reinterpret_cast<int*>(device::shared_memory());
    const int me = device::thread_index(), half = me / 64;
    for (int round = 0; round < 3; ++round) {
      values[me] = me + round;
      device::barrier_sync(half == 0 ? Barrier::kComm : Barrier::kMath, 64);
      out.as<int>()[me] = values[half * 64 + (me + 32) % 64];
      device::barrier_sync(half == 0 ? Barrier::kComm : Barrier::kMath, 64);
    }
  });
  check(out.values<int>()[100] == 68 + 2, "value");
  // Barriers of different groups order nothing between them.
  is_caught(seed, {.launch = {.threads = 128, .shared_bytes = 512}}, {"shared memory"}, [&] {
    int* values = reinterpret_cast<int*>(device::shared_memory());
    const int me = device::thread_index(), half = me / 64;
    values[me] = me;
    device::barrier_sync(half == 0 ? Barrier::kComm : Barrier::kMath, 64);
    out.as<int>()[me] = values[(me + 64) % 128];
  });
}

void barrier_misuse(uint64_t seed) {
  const Trial trial{.launch = {.threads = 128}};
  is_caught(seed, trial, {"barrier 1", "128"},
            [] { device::barrier_sync(Barrier::kComm, device::warp_index() < 2 ? 64 : 128); });
  is_caught(seed, trial, {"barrier misuse:", "in warps of 32"},
            [] { device::barrier_sync(Barrier::kComm, 48); });
  is_caught(seed, trial, {"barrier misuse:", "in warps of 32"},
            [] { device::barrier_sync(Barrier::kComm, 256); });
  is_caught(seed, trial, {"barrier misuse:", "although only 16 lanes of warp"}, [] {
    if (device::lane_index() < 16) device::barrier_sync(Barrier::kComm, 64);
  });
  is_caught(seed, trial,
            {"deadlock", "block 0 warps 0-2: barrier 0, to which 96 of 128 threads came"}, [] {
              if (device::warp_index() < 3) device::block_sync();
            });
}

}  // namespace

std::vector<Case> warp_cases() {
  return {
      {"exchange within a warp", exchange},
      {"misuse of a warp", warp_misuse},
      {"named barriers", named_barriers},
      {"misuse of barriers", barrier_misuse},
  };
}

}  // namespace flashmoe::testing
