// Exchange of values within a full warp (PTX ISA, `shfl.sync`, `vote.sync`, `match.sync`). No
// memory access is ordered by them.
#pragma once

#include <bit>

#include "kernels/device/body.h"
#include "kernels/device/identity.h"

namespace flashmoe::device {

// The value of lane `source`.
FLASHMOE_DEVICE uint32_t shuffle(uint32_t value, int source) {
#if FLASHMOE_EMULATED
  return emulator::shuffle(value, source);
#else
  return __shfl_sync(kFullMask, value, source);
#endif
}
FLASHMOE_DEVICE int32_t shuffle(int32_t value, int source) {
  return static_cast<int32_t>(shuffle(static_cast<uint32_t>(value), source));
}
FLASHMOE_DEVICE float shuffle(float value, int source) {
#if FLASHMOE_EMULATED
  return std::bit_cast<float>(emulator::shuffle(std::bit_cast<uint32_t>(value), source));
#else
  return __shfl_sync(kFullMask, value, source);
#endif
}
FLASHMOE_DEVICE int64_t shuffle(int64_t value, int source) {
  const uint64_t bits = static_cast<uint64_t>(value);
  const uint32_t low = shuffle(static_cast<uint32_t>(bits), source);
  const uint32_t high = shuffle(static_cast<uint32_t>(bits >> 32), source);
  return static_cast<int64_t>((uint64_t{high} << 32) | low);
}

// The value of lane `lane_index() ^ mask`.
template <typename T>
FLASHMOE_DEVICE T shuffle_xor(T value, int mask) {
  return shuffle(value, lane_index() ^ mask);
}

// Bit i: the predicate of lane i.
FLASHMOE_DEVICE uint32_t ballot(bool predicate) {
#if FLASHMOE_EMULATED
  return emulator::ballot(predicate);
#else
  return __ballot_sync(kFullMask, predicate);
#endif
}

FLASHMOE_DEVICE bool any(bool predicate) { return ballot(predicate) != 0; }
FLASHMOE_DEVICE bool all(bool predicate) { return ballot(predicate) == kFullMask; }

// Bit i: lane i has the same value.
FLASHMOE_DEVICE uint32_t match_any(uint32_t value) {
#if FLASHMOE_EMULATED
  return emulator::match_any(value);
#else
  return __match_any_sync(kFullMask, value);
#endif
}

// True in one lane of the warp, whichever, by all lanes together (`elect.sync`, from sm_90 on). The
// compiler knows then that there is only one, and needs no loop over lanes for an instruction that
// takes uniform registers.
FLASHMOE_DEVICE bool elect() {
#if FLASHMOE_EMULATED
  return ballot(true) != 0 && lane_index() == kWarpSize - 1;  // not the lane that one would guess
#else
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
#endif
}

FLASHMOE_DEVICE int count_bits(uint32_t bits) {
#if FLASHMOE_EMULATED
  return std::popcount(bits);
#else
  return __popc(bits);
#endif
}

// Position of the lowest set bit of a non-zero word.
FLASHMOE_DEVICE int lowest_bit(uint32_t bits) {
#if FLASHMOE_EMULATED
  return std::countr_zero(bits);
#else
  return __ffs(static_cast<int>(bits)) - 1;
#endif
}

// Position of the highest set bit of a non-zero word.
FLASHMOE_DEVICE int highest_bit(uint32_t bits) {
#if FLASHMOE_EMULATED
  return 31 - std::countl_zero(bits);
#else
  return 31 - __clz(static_cast<int>(bits));
#endif
}

}  // namespace flashmoe::device
