// A tensor in global memory as TMA sees it, made by the host. Opaque, so that host code, the kernel
// and the emulator agree on the layout of what contains one: a CUtensorMap on a GPU, an
// emulator::TensorMap in the emulator.
#pragma once

#include <cstdint>
#include <cstring>

namespace flashmoe::device {

struct alignas(64) TensorMap {
  uint64_t opaque[16];

  // From a CUtensorMap or an emulator::TensorMap.
  template <typename T>
  static TensorMap from(const T& map) {
    static_assert(sizeof(T) <= sizeof(opaque));
    TensorMap result{};
    std::memcpy(result.opaque, &map, sizeof(T));
    return result;
  }
};

}  // namespace flashmoe::device
