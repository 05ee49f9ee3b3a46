// An epoch is one execution of the operator on a symmetric heap. PEs agree on it without a barrier.
//
// Why one set of buffers is enough: nobody writes into q's heap in epoch n + 1 before it has read
// q's count row of n + 1, and q publishes that row only after it has finished n and zeroed its
// signals. Why the count matrix needs two: p writes parity n again in n + 2, after finishing n + 1,
// for which it read q's row of n + 1, which q published after it was done with the counts of n.
#pragma once

#include <cstdint>

#include "kernels/core/host_device.h"

namespace flashmoe::core {

// Which of the two count matrices an epoch uses.
FLASHMOE_HOST_DEVICE constexpr uint32_t parity(uint32_t epoch) { return epoch & 1u; }

// The word put into `counted`: the epoch, which is 1 on a new (zeroed) heap, and the tag of the
// call site. Two PEs that meet in the same epoch with different tags are in different calls of the
// program.
FLASHMOE_HOST_DEVICE constexpr uint64_t counted_word(uint32_t tag, uint32_t epoch) {
  return (uint64_t{tag} << 32) | epoch;
}
FLASHMOE_HOST_DEVICE constexpr uint32_t epoch_of(uint64_t word) {
  return static_cast<uint32_t>(word);
}
FLASHMOE_HOST_DEVICE constexpr uint32_t tag_of(uint64_t word) {
  return static_cast<uint32_t>(word >> 32);
}

enum class Counted { kNotYet, kHere, kOtherCall };

// Judges what a waiter sees in `counted` of a peer. An epoch other than mine or the one of equal
// parity before it (two earlier, or the zero of a new heap) can only come from a PE that executes
// another sequence of calls.
FLASHMOE_HOST_DEVICE constexpr Counted judge_counted(uint64_t seen, uint32_t tag, uint32_t epoch) {
  if (seen == counted_word(tag, epoch)) return Counted::kHere;
  if (seen == 0 || epoch_of(seen) + 2 == epoch) return Counted::kNotYet;
  return Counted::kOtherCall;
}

}  // namespace flashmoe::core
