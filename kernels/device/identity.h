// Who a thread is (PTX ISA, "Special Registers": %tid, %ctaid, %nctaid).
#pragma once

#include "kernels/device/body.h"

namespace flashmoe::device {

FLASHMOE_DEVICE int thread_index() {
#if FLASHMOE_EMULATED
  return emulator::thread_index();
#else
  return static_cast<int>(threadIdx.x);
#endif
}

FLASHMOE_DEVICE int block_index() {
#if FLASHMOE_EMULATED
  return emulator::block_index();
#else
  return static_cast<int>(blockIdx.x);
#endif
}

// CTAs of the launch.
FLASHMOE_DEVICE int block_count() {
#if FLASHMOE_EMULATED
  return emulator::block_count();
#else
  return static_cast<int>(gridDim.x);
#endif
}

FLASHMOE_DEVICE int lane_index() {
#if FLASHMOE_EMULATED
  return emulator::thread_index() % kWarpSize;
#else
  return static_cast<int>(threadIdx.x % kWarpSize);
#endif
}

// Equal in all threads of a warp; the compiler is told so, so that what depends on it is uniform.
FLASHMOE_DEVICE int warp_index() {
#if FLASHMOE_EMULATED
  return emulator::thread_index() / kWarpSize;
#else
  return __shfl_sync(kFullMask, static_cast<int>(threadIdx.x / kWarpSize), 0);
#endif
}

// The dynamic shared memory of the CTA, aligned to 1024 bytes.
FLASHMOE_DEVICE std::byte* shared_memory() {
#if FLASHMOE_EMULATED
  return emulator::shared_memory();
#else
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<std::byte*>(dynamic_shared_memory);
#endif
}

}  // namespace flashmoe::device
