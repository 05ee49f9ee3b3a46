// Moves registers between warpgroups (PTX ISA, `setmaxnreg`; sm_90a). Executed by all warps of a
// warpgroup.
#pragma once

#include "kernels/device/body.h"

namespace flashmoe::device {

template <int kRegisters>
FLASHMOE_DEVICE void keep_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#if !FLASHMOE_EMULATED && defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
FLASHMOE_DEVICE void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#if !FLASHMOE_EMULATED && defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

}  // namespace flashmoe::device
