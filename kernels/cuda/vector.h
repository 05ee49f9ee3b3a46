// 16 bytes at a time: how rows are moved. All row lengths are multiples of it.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "kernels/device/element.h"
#include "kernels/device/identity.h"

namespace flashmoe::cuda {

struct alignas(16) Vector {
  uint32_t words[4];
};

template <typename Element>
inline constexpr int kVectorElements = sizeof(Vector) / sizeof(Element);

template <typename Element>
struct alignas(16) Elements {
  Element values[kVectorElements<Element>];
};

FLASHMOE_DEVICE int64_t vectors(int64_t bytes) { return bytes / int64_t{sizeof(Vector)}; }

// Copies bytes, a multiple of 16, between aligned addresses; several loads are on their way before
// the first store.
FLASHMOE_DEVICE void copy_by_warp(std::byte* to, const std::byte* from, int64_t bytes,
                                  int32_t lane) {
  constexpr int kInFlight = 8;
  const Vector* source = reinterpret_cast<const Vector*>(from);
  Vector* target = reinterpret_cast<Vector*>(to);
  const int64_t count = vectors(bytes);
  int64_t i = lane;
  for (; i + (kInFlight - 1) * device::kWarpSize < count; i += kInFlight * device::kWarpSize) {
    Vector loaded[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) loaded[j] = source[i + j * device::kWarpSize];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) target[i + j * device::kWarpSize] = loaded[j];
  }
  for (; i < count; i += device::kWarpSize) target[i] = source[i];
}

}  // namespace flashmoe::cuda
