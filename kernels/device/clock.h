// Time (PTX ISA, %globaltimer, `nanosleep`).
#pragma once

#include "kernels/device/body.h"

namespace flashmoe::device {

// Nanoseconds of a clock that all SMs of the GPU share; its resolution may be a microsecond.
FLASHMOE_DEVICE uint64_t nanoseconds() {
#if FLASHMOE_EMULATED
  return emulator::nanoseconds();
#else
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
#endif
}

// Lets others run for about that long; at most a millisecond.
FLASHMOE_DEVICE void sleep(uint32_t nanoseconds) {
#if FLASHMOE_EMULATED
  emulator::sleep(nanoseconds);
#else
  asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds));
#endif
}

}  // namespace flashmoe::device
