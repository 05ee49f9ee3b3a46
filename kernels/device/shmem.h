// One-sided communication with PEs whose memory this GPU cannot address (NVSHMEM API). Only kernels
// of the network transport include it: they are compiled with NVSHMEM's headers and linked with its
// device library.
//
// `target` and `signal` are symmetric addresses: those of the same objects in this PE's own memory.
// `pe` is NVSHMEM's number of a PE.
#pragma once

#include "kernels/device/body.h"
#include "kernels/device/identity.h"

#if !FLASHMOE_EMULATED
#include <nvshmem.h>
#include <nvshmemx.h>
#endif

namespace flashmoe::device {

enum class SignalOp { kSet, kAdd };

// Starts to copy bytes from symmetric memory of this PE, and then to update a signal of the PE that
// gets them. Whoever sees the update there sees these bytes, but not those of earlier puts. The
// source may change once the bytes are there. By all lanes of a warp, alike; it does not order what
// they wrote (NVSHMEM API, "Signaling Operations", nvshmemx_putmem_signal_nbi_warp).
FLASHMOE_DEVICE void put_signal(void* target, const void* source, size_t bytes, uint64_t* signal,
                                uint64_t value, SignalOp operation, int pe) {
#if FLASHMOE_EMULATED
  emulator::ballot(true);
  if (lane_index() == 0) {
    emulator::put_signal(target, source, bytes, signal, value, operation == SignalOp::kAdd, pe);
  }
  emulator::ballot(true);
#else
  nvshmemx_putmem_signal_nbi_warp(
      target, source, bytes, signal, value,
      operation == SignalOp::kAdd ? NVSHMEM_SIGNAL_ADD : NVSHMEM_SIGNAL_SET, pe);
#endif
}

// Waits until everything that this thread has put is there, however long that takes (NVSHMEM API,
// "Memory Ordering", nvshmem_quiet).
FLASHMOE_DEVICE void quiet() {
#if FLASHMOE_EMULATED
  emulator::quiet();
#else
  nvshmem_quiet();
#endif
}

// The value of a signal of this PE; orders nothing (NVSHMEM API, "Signaling Operations",
// nvshmem_signal_fetch).
FLASHMOE_DEVICE uint64_t signal_fetch(uint64_t* signal) {
#if FLASHMOE_EMULATED
  return emulator::atomic_load(signal, sizeof(*signal), emulator::Order::kRelaxed,
                               emulator::Scope::kSystem);
#else
  return nvshmem_signal_fetch(signal);
#endif
}

// Whether a signal of this PE is at least `value`. If so, what was put with the updates that made
// it so is visible from here on (NVSHMEM API, "Point-To-Point Synchronization", nvshmem_test).
FLASHMOE_DEVICE bool signal_reached(uint64_t* signal, uint64_t value) {
#if FLASHMOE_EMULATED
  return emulator::atomic_load(signal, sizeof(*signal), emulator::Order::kAcquire,
                               emulator::Scope::kSystem) >= value;
#else
  return nvshmem_uint64_test(signal, NVSHMEM_CMP_GE, value) != 0;
#endif
}

}  // namespace flashmoe::device
