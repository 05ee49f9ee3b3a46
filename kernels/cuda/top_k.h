// The best of up to kLanes * kValues numbers, again and again, by kLanes lanes of a warp; several
// such teams of lanes work side by side. Ties go to the lowest index.
#pragma once

#include <cstdint>

#include "kernels/device/element.h"
#include "kernels/device/identity.h"
#include "kernels/device/warp.h"

namespace flashmoe::cuda {

// Integers in the order of the numbers, which is total with NaN in it; 0 is below all of them.
FLASHMOE_DEVICE uint32_t order_key(float x) {
  const uint32_t bits = device::float_bits(x);
  const uint32_t key = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  return key == 0 ? 1 : key;
}

template <int kLanes, int kValues>
struct TopK {
  uint32_t keys[kValues];  // of numbers lane % kLanes + i * kLanes; 0: not there, or taken

  // Takes the best number and returns its index, in all lanes of the team.
  FLASHMOE_DEVICE int32_t take() {
    const int member = device::lane_index() % kLanes;
    uint32_t best = keys[0];
    int32_t index = 0;
#pragma unroll
    for (int i = 1; i < kValues; ++i) {
      if (keys[i] > best) {
        best = keys[i];
        index = i;
      }
    }
    index = index * kLanes + member;
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      const uint32_t other = device::shuffle_xor(best, distance);
      const int32_t other_index = device::shuffle_xor(index, distance);
      if (other > best || (other == best && other_index < index)) {
        best = other;
        index = other_index;
      }
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (i * kLanes == index - member) keys[i] = 0;
    }
    return index;
  }
};

}  // namespace flashmoe::cuda
