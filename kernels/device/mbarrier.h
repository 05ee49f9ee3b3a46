// Barriers in shared memory that count arrivals of threads and bytes of asynchronous copies (PTX
// ISA, "mbarrier"). A barrier is in phase 0, 1, 2, ...; it enters the next one when all expected
// arrivals and bytes have come. Waiters name the parity of the phase whose end they wait for.
#pragma once

#include "kernels/device/body.h"

namespace flashmoe::device {

struct Mbarrier {
  uint64_t state;
};

// By one thread, before others use it; then fence_mbarrier_init and a block barrier.
FLASHMOE_DEVICE void mbarrier_init(Mbarrier* barrier, uint32_t arrivals) {
#if FLASHMOE_EMULATED
  emulator::mbarrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#endif
}

// Makes the initialisation visible to the async proxy.
FLASHMOE_DEVICE void fence_mbarrier_init() {
#if FLASHMOE_EMULATED
  emulator::fence_mbarrier_init();
#elif __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// By one thread, after all use: the memory may be used otherwise (PTX ISA, `mbarrier.inval`).
FLASHMOE_DEVICE void mbarrier_invalidate(Mbarrier* barrier) {
#if FLASHMOE_EMULATED
  emulator::mbarrier_invalidate(barrier);
#else
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// One arrival, with release semantics.
FLASHMOE_DEVICE void mbarrier_arrive(Mbarrier* barrier) {
#if FLASHMOE_EMULATED
  emulator::mbarrier_arrive(barrier, 0);
#else
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(
                   shared_address(barrier))
               : "memory");
#endif
}

#if FLASHMOE_EMULATED || __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)
// One arrival, and this phase waits for `bytes` more bytes of asynchronous copies (sm_90).
FLASHMOE_DEVICE void mbarrier_arrive_expect(Mbarrier* barrier, uint32_t bytes) {
#if FLASHMOE_EMULATED
  emulator::mbarrier_arrive(barrier, bytes);
#else
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(
          shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}
#endif

// Whether the phase of that parity has ended; acquire if so. May return false early.
FLASHMOE_DEVICE bool mbarrier_test(Mbarrier* barrier, uint32_t parity) {
#if FLASHMOE_EMULATED
  return emulator::mbarrier_test(barrier, parity);
#else
  uint32_t done;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
      " selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
#else
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;"
      " selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
#endif
  return done != 0;
#endif
}

// Waits for the end of the phase of that parity. For what is sure to come within the CTA; whoever
// waits for another CTA or PE uses a bounded wait (kernels/cuda/wait.h).
FLASHMOE_DEVICE void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
#if FLASHMOE_EMULATED
  emulator::mbarrier_wait(barrier, parity);
#else
  while (!mbarrier_test(barrier, parity)) {
  }
#endif
}

}  // namespace flashmoe::device
