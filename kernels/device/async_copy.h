// 16-byte copies from global to shared memory that a thread does not wait for (PTX ISA,
// `cp.async`; sm_80). They use the generic proxy.
#pragma once

#include "kernels/device/body.h"
#include "kernels/device/mbarrier.h"

namespace flashmoe::device {

// Copies the first `bytes` (0 to 16) of 16 bytes and fills the rest with zeros. Both addresses are
// multiples of 16; with 0 bytes the source is not read.
FLASHMOE_DEVICE void async_copy_16(void* shared, const void* global, uint32_t bytes) {
#if FLASHMOE_EMULATED
  emulator::async_copy_16(shared, global, bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
#endif
}

// An arrival on the barrier once all earlier async_copy_16 of this thread are done. The barrier
// counts it like any other arrival (`.noinc`).
FLASHMOE_DEVICE void async_copy_arrive(Mbarrier* barrier) {
#if FLASHMOE_EMULATED
  emulator::async_copy_arrive(barrier);
#else
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
#endif
}

}  // namespace flashmoe::device
