// Memory for intermediate results, kept between calls.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "kernels/cpu/heap.h"

namespace flashmoe::cpu {

// A few buffers that grow and are never cleared. `kCount` names how many a user needs.
template <int kCount>
class Buffers {
 public:
  // Room for `count` elements in buffer i, null for none; what it held is lost if it had to grow.
  template <typename T>
  T* reserve(int i, int64_t count) {
    Buffer& buffer = buffers_[i];
    if (count == 0) return nullptr;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (buffer.bytes < bytes) {
      buffer.memory = nullptr;  // first give back, then take
      buffer.memory = std::make_unique<Memory>(bytes);
      buffer.bytes = bytes;
    }
    return reinterpret_cast<T*>(buffer.memory->data());
  }

 private:
  struct Buffer {
    std::unique_ptr<Memory> memory;
    int64_t bytes = 0;
  };
  std::array<Buffer, kCount> buffers_;
};

// What all workers of a PE share during a call: intermediate results of its row blocks.
using Arena = Buffers<4>;

// What one worker needs for one tile.
using TileBuffers = Buffers<4>;

}  // namespace flashmoe::cpu
