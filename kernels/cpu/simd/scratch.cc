#include "kernels/cpu/simd/scratch.h"

#include <array>
#include <memory>
#include <new>

namespace flashmoe::cpu::simd {
namespace {

constexpr std::align_val_t kPage{4096};

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, kPage); }
};

struct Buffer {
  std::unique_ptr<void, Free> memory;
  int64_t bytes = 0;
};

}  // namespace

void* reserve_scratch(Scratch kind, int64_t bytes) {
  thread_local std::array<Buffer, kScratchKinds> buffers;
  Buffer& buffer = buffers[static_cast<size_t>(kind)];
  if (buffer.bytes < bytes) {
    buffer.bytes = 0;
    buffer.memory.reset();  // first give back, then take
    buffer.memory.reset(::operator new(static_cast<size_t>(bytes), kPage));
    buffer.bytes = bytes;
  }
  return buffer.memory.get();
}

}  // namespace flashmoe::cpu::simd
