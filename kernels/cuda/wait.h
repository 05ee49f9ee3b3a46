// Bounded waits. Every wait for another CTA or PE ends: because what it waits for came, because
// somebody else of this PE failed, or because the deadline passed, which it then reports.
#pragma once

#include <cstdint>

#include "kernels/cuda/context.h"
#include "kernels/device/clock.h"
#include "kernels/device/memory_order.h"

namespace flashmoe::cuda {

FLASHMOE_DEVICE bool has_failed(const Context& context) {
  return device::load_relaxed<device::Scope::kGpu>(&context.control()->failed) != 0;
}

// The first failure of a PE is recorded for the host, and ends the waits of all its CTAs.
FLASHMOE_DEVICE void fail(const Context& context, Failure failure, int64_t awaited,
                          uint64_t expected, uint64_t seen) {
  using device::Scope;
  Control* control = context.control();
  if (device::compare_exchange<Scope::kGpu>(&control->failed, 0u, 1u) != 0) return;
  ErrorRecord* error = context.pe.error;
  error->pe = context.rank;
  error->awaited = awaited;
  error->expected = expected;
  error->seen = seen;
  device::fence<Scope::kSystem>();
  device::store_relaxed<Scope::kSystem>(&error->failure, static_cast<uint32_t>(failure));
}

// A wait for CTAs of the same PE has twice the deadline: what keeps them is a wait for another PE,
// which then reports first, and names it.
FLASHMOE_DEVICE uint64_t deadline_of(const Context& context, Failure failure) {
  const bool own = failure == Failure::kBarrier || failure == Failure::kFirstStage ||
                   failure == Failure::kSecondStage;
  return device::nanoseconds() + context.arguments.deadline * (own ? 2 : 1);
}

// Waits until `load` returns a value that `done` accepts; false: the PE has failed.
template <typename Load, typename Done>
FLASHMOE_DEVICE bool wait_until(const Context& context, Failure failure, int64_t awaited,
                                uint64_t expected, const Load& load, const Done& done) {
  constexpr uint32_t kShortest = 32, kLongest = 512;  // nanoseconds between two looks
  uint64_t value = load();
  if (done(value)) return true;
  const uint64_t deadline = deadline_of(context, failure);
  for (uint32_t pause = kShortest;;) {
    device::sleep(pause);
    value = load();
    if (done(value)) return true;
    if (has_failed(context)) return false;
    if (device::nanoseconds() > deadline) {
      fail(context, failure, awaited, expected, value);
      return false;
    }
    if (pause < kLongest) pause *= 2;
  }
}

// Waits for a counter of this PE that others add to.
template <device::Scope kScope, typename T>
FLASHMOE_DEVICE bool wait_for_count(const Context& context, const T* counter, uint64_t expected,
                                    Failure failure, int64_t awaited) {
  return wait_until(
      context, failure, awaited, expected,
      [&] { return uint64_t{device::load_acquire<kScope>(counter)}; },
      [&](uint64_t seen) { return seen >= expected; });
}

}  // namespace flashmoe::cuda
