// Memory for intermediate results, kept between calls.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/cpu/heap.h"
#include "kernels/cpu/product.h"
#include "kernels/cpu/storage.h"

namespace flashmoe::cpu {

// A few float buffers that grow and are never cleared. `kCount` names how many a user needs.
template <int kCount>
class Buffers {
 public:
  // Room for `count` floats in buffer i, null for none; what it held is lost if it had to grow.
  float* reserve(int i, int64_t count) {
    Buffer& buffer = buffers_[i];
    if (count == 0) return nullptr;
    if (buffer.count < count) {
      buffer.memory = nullptr;  // first give back, then take
      buffer.memory = std::make_unique<Memory>(count * static_cast<int64_t>(sizeof(float)));
      buffer.count = count;
    }
    return reinterpret_cast<float*>(buffer.memory->data());
  }

 private:
  struct Buffer {
    std::unique_ptr<Memory> memory;
    int64_t count = 0;
  };
  std::array<Buffer, kCount> buffers_;
};

// What all workers of a PE share during a call: intermediate results of its row blocks.
using Arena = Buffers<4>;

// What one worker needs for one tile.
using TileBuffers = Buffers<5>;

// A matrix of the storage type as floats: itself if it is float, else a copy in `buffer`.
inline ConstMatrix as_float(const float* data, int64_t stride, int64_t, int64_t, TileBuffers&,
                            int) {
  return {data, stride};
}
template <typename S>
ConstMatrix as_float(const S* data, int64_t stride, int64_t rows, int64_t columns,
                     TileBuffers& buffers, int buffer) {
  float* copy = buffers.reserve(buffer, rows * columns);
  convert(data, stride, copy, columns, rows, columns);
  return {copy, columns};
}

}  // namespace flashmoe::cpu
