// Barriers among threads of one CTA (PTX ISA, `barrier.cta`, `bar.warp.sync`). Each orders the
// memory accesses of its participants before it with those after it.
#pragma once

#include "kernels/device/body.h"

namespace flashmoe::device {

// The 16 hardware barriers of a CTA, by use. Barrier 0 is block_sync's.
enum class Barrier : int { kBlock = 0, kComm = 1, kMath = 2, kFirstFree = 3 };

// All threads of the CTA.
FLASHMOE_DEVICE void block_sync() {
#if FLASHMOE_EMULATED
  emulator::barrier_sync(0, emulator::block_threads());
#else
  __syncthreads();
#endif
}

// Waits until `threads` threads (a multiple of the warp size) have come to the barrier.
FLASHMOE_DEVICE void barrier_sync(Barrier barrier, int threads) {
#if FLASHMOE_EMULATED
  emulator::barrier_sync(static_cast<int>(barrier), threads);
#else
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(static_cast<int>(barrier)), "r"(threads)
               : "memory");
#endif
}

// Converges the warp.
FLASHMOE_DEVICE void warp_sync() {
#if FLASHMOE_EMULATED
  emulator::warp_sync();
#else
  __syncwarp();
#endif
}

}  // namespace flashmoe::device
