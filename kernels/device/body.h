// The device/emulated switch. Every function of kernels/device has two bodies: the PTX one, which
// nvcc compiles, and the emulated one, which a plain C++ compiler does. Nothing outside this folder
// uses a CUDA builtin or PTX, so that the very source that a GPU runs also runs on a CPU.
//
// What follows from it for kernel code: it is ordinary C++ between calls of these functions, it
// names its thread only through identity.h, and memory that several threads share without a barrier
// between them is only touched through memory_order.h.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define FLASHMOE_EMULATED 0
#define FLASHMOE_DEVICE __device__ __forceinline__
#else
#define FLASHMOE_EMULATED 1
#define FLASHMOE_DEVICE inline
#endif

#if FLASHMOE_EMULATED
#include "kernels/emulator/hooks.h"
#endif

namespace flashmoe::device {

inline constexpr int kWarpSize = 32;
inline constexpr int kWarpgroupSize = 128;
inline constexpr uint32_t kFullMask = 0xffffffffu;

#if !FLASHMOE_EMULATED
// The 32-bit address in the shared window that PTX instructions take (PTX ISA, `cvta`).
FLASHMOE_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

}  // namespace flashmoe::device
