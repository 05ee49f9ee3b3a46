// wgmma used rightly and wrongly. What it computes, tensor_core_cases.cc tests.
#include "kernels/cpu/storage.h"
#include "kernels/device/barrier.h"
#include "kernels/device/identity.h"
#include "kernels/device/memory_order.h"
#include "kernels/device/wgmma.h"
#include "tests/emulator/cases.h"

namespace flashmoe::testing {
namespace {

using core::BFloat16;
using emulator::GlobalMemory;

constexpr int kColumns = 128;

struct Operands {
  alignas(1024) BFloat16 a[64][64];
  alignas(1024) BFloat16 b[2][64][64];
};

Operands& operands() { return *reinterpret_cast<Operands*>(device::shared_memory()); }

enum class Fault {
  kNone,
  kNoProxyFence,  // the operands are written through the generic proxy
  kNoBarrier,     // the warpgroup does not wait for the other one, which wrote them
  kNoWgmmaFence,
  kReadsAccumulators,
  kWritesAccumulators,
  kOverwritesOperands,
  kReleasesEarly,  // another warpgroup overwrites operands before the wait
  kDifferent,      // a thread issues another product
  kDifferentGroups,
  kOneWarpStays,
  kNoCommit,
};

// Warpgroup 1 writes ones and twos, warpgroup 0 multiplies twice.
Kernel kernel(GlobalMemory& out, Fault fault) {
  return [&out, fault] {
    const int me = device::thread_index();
    if (me >= 128) {
      uint32_t* words = reinterpret_cast<uint32_t*>(&operands());
      for (size_t i = static_cast<size_t>(me - 128); i < sizeof(Operands) / 4; i += 128) {
        words[i] = i < sizeof(Operands::a) / 4 ? 0x3f803f80u : 0x40004000u;
      }
      if (fault != Fault::kNoProxyFence) device::fence_proxy_async();
    }
    if (fault != Fault::kNoBarrier) device::block_sync();
    if (me >= 128) {
      if (fault != Fault::kReleasesEarly) device::block_sync();
      operands().a[me / 2 % 64][me % 2] = {0};
      return;
    }
    float d[kColumns / 2] = {};
    const auto a = device::k_major_descriptor(operands().a);
    const auto b = device::mn_major_descriptor(operands().b, sizeof(operands().b[0]));
    if (fault != Fault::kNoWgmmaFence) device::wgmma_fence();
    if (fault == Fault::kOneWarpStays && device::warp_index() == 3) return;
    device::wgmma<BFloat16, kColumns>(d, a, b, false);
    const bool other = fault == Fault::kDifferent && me == 77;
    device::wgmma<BFloat16, kColumns>(d, a.plus(other ? 64 : 32), b.plus(2048), true);
    if (fault == Fault::kReadsAccumulators) out.as<float>()[me] = d[0] + 1.0f;
    if (fault == Fault::kWritesAccumulators) d[5] = 1.0f;
    if (fault == Fault::kOverwritesOperands) operands().b[1][me / 64][me % 64] = {0};
    if (fault == Fault::kDifferentGroups && me == 3) device::wgmma_commit();
    if (fault != Fault::kNoCommit) device::wgmma_commit();
    if (fault == Fault::kDifferentGroups && me == 3) return;
    device::wgmma_finish(d);
    if (fault == Fault::kNoCommit) return;
    device::block_sync();
    if (fault == Fault::kReadsAccumulators) return;
    for (int i = 0; i < kColumns / 2; ++i) out.as<float>()[me * kColumns / 2 + i] = d[i];
  };
}

void products(uint64_t seed) {
  GlobalMemory out(64 * kColumns * 4, "out");
  const Trial trial{.launch = {.threads = 256, .shared_bytes = sizeof(Operands)}, .seeds = 12};
  passes(seed, trial, kernel(out, Fault::kNone));
  for (const float x : out.values<float>()) check(x == 64.0f, "2 x 16 products of 1 and 2");
  // Registers in flight hold NaN.
  passes(seed, trial, kernel(out, Fault::kReadsAccumulators));
  for (size_t i = 0; i < 128; ++i)
    check(!(out.values<float>()[i] == out.values<float>()[i]), "NaN");
}

void misuse(uint64_t seed) {
  GlobalMemory out(64 * kColumns * 4, "out");
  const Trial trial{.launch = {.threads = 256, .shared_bytes = sizeof(Operands)}, .seeds = 12};
  const auto caught = [&](Fault fault, const std::vector<std::string>& parts) {
    is_caught(seed, trial, parts, kernel(out, fault));
  };
  caught(Fault::kNoProxyFence, {"proxy: a wgmma of block 0 warpgroup 0", "is missing"});
  caught(Fault::kNoWgmmaFence, {"wgmma misuse:", "wgmma_fence is missing"});
  caught(Fault::kWritesAccumulators, {"wgmma misuse:", "accumulators were written"});
  caught(Fault::kOverwritesOperands,
         {"stage reused early: block 0 warp", "a wgmma of block 0 warpgroup 0 may still read"});
  caught(Fault::kReleasesEarly, {"shared memory of block 0", "a wgmma of block 0 warpgroup 0"});
  caught(Fault::kDifferent, {"wgmma misuse:", "issued a different one as their number 2"});
  caught(Fault::kDifferentGroups, {"wgmma misuse:"});
  caught(Fault::kOneWarpStays, {"deadlock", "block 0 warps 0-2: wgmma_wait"});
  caught(Fault::kNoBarrier, {"shared memory of block 0"});
  is_caught(seed, trial, {"wgmma misuse:", "ends while its accumulators are in flight"},
            kernel(out, Fault::kNoCommit));
}

}  // namespace

std::vector<Case> wgmma_cases() {
  return {{"wgmma, used rightly", products}, {"misuse of wgmma", misuse}};
}

}  // namespace flashmoe::testing
