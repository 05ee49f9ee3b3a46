// One-sided communication with PEs whose memory this GPU cannot address (NVSHMEM API). Only kernels
// of the network transport include it: they are compiled with NVSHMEM's headers and linked with its
// device library.
//
// `target` and `signal` are symmetric addresses: those of the same objects in this PE's own memory.
// `pe` is NVSHMEM's number of a PE.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "kernels/device/body.h"
#include "kernels/device/identity.h"

#if !FLASHMOE_EMULATED
#include <nvshmem.h>
#include <nvshmemx.h>
#endif

namespace flashmoe::device {

enum class SignalOp { kSet, kAdd };

// Starts to copy bytes from symmetric memory of this PE, and then to update a signal of the PE that
// gets them. Whoever learns of the update there by signal_reached sees these bytes, but not those
// of earlier puts. By all lanes of a warp, alike; it does not order what they wrote. It may wait
// for room in the queue of the network, for which there is no deadline (NVSHMEM API, "Signaling
// Operations", nvshmemx_putmem_signal_nbi_warp).
//
// When may the source change? By the API after a quiet. We rely on more: whoever knows that the
// signal was updated may change it. The network has read the bytes by then, since it has delivered
// them, and a reliable connection does not deliver them twice.
FLASHMOE_DEVICE void put_signal(void* target, const void* source, size_t bytes, uint64_t* signal,
                                uint64_t value, SignalOp operation, int pe) {
#if FLASHMOE_EMULATED
  uint64_t all = 0;
  for (const uint64_t argument :
       {reinterpret_cast<uint64_t>(target), reinterpret_cast<uint64_t>(source), uint64_t{bytes},
        reinterpret_cast<uint64_t>(signal), value, static_cast<uint64_t>(operation),
        static_cast<uint64_t>(pe)}) {
    all = (all ^ argument) * 0x9e3779b97f4a7c15u;
  }
  const bool alike = emulator::match_any(static_cast<uint32_t>(all >> 32)) == ~0u;
  if (lane_index() == 0) {
    emulator::put_signal(target, source, bytes, signal, value, operation == SignalOp::kAdd, pe,
                         alike);
  }
  emulator::ballot(true);
#else
  nvshmemx_putmem_signal_nbi_warp(
      target, source, bytes, signal, value,
      operation == SignalOp::kAdd ? NVSHMEM_SIGNAL_ADD : NVSHMEM_SIGNAL_SET, pe);
#endif
}

// Waits until everything that this PE has put is there, however long that takes (NVSHMEM API,
// "Memory Ordering", nvshmem_quiet). The emulator waits for what this thread has put, which is
// less.
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
  if (emulator::atomic_load(signal, sizeof(*signal), emulator::Order::kAcquire,
                            emulator::Scope::kSystem) < value) {
    return false;
  }
  emulator::acquire_puts(signal);
  return true;
#else
  return nvshmem_uint64_test(signal, NVSHMEM_CMP_GE, value) != 0;
#endif
}

}  // namespace flashmoe::device
