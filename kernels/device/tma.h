// Copies of boxes of a tensor in global memory into shared memory (PTX ISA, `cp.async.bulk.tensor`;
// sm_90). Elements of a box outside the tensor are zeros. They use the async proxy.
#pragma once

#include "kernels/device/body.h"
#include "kernels/device/mbarrier.h"
#include "kernels/device/tensor_map.h"

namespace flashmoe::device {

// Tensor maps here describe at most 3 dimensions and a box with the 128-byte swizzle: the innermost
// side of the box is 128 bytes, and in shared memory, whose address is a multiple of 1024, 16-byte
// chunk c of the box's i-th 128-byte line lies at chunk c ^ (i % 8) of that line. There are no
// other swizzles, for all lines of a tile have 128 bytes: 64 elements of 16 bits.

FLASHMOE_DEVICE void tma_prefetch(const TensorMap* map) {
#if FLASHMOE_EMULATED
  static_cast<void>(map);
#elif __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// Copies the box at (x, y, z), x innermost, and completes its bytes on the barrier.
FLASHMOE_DEVICE void tma_load(void* shared, const TensorMap* map, Mbarrier* barrier, int32_t x,
                              int32_t y, int32_t z) {
#if FLASHMOE_EMULATED
  emulator::tma_load(shared, reinterpret_cast<const emulator::TensorMap*>(map), barrier, x, y, z);
#elif __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
#endif
}

}  // namespace flashmoe::device
