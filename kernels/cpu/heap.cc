#include "kernels/cpu/heap.h"

#include <sys/mman.h>

#include <new>

namespace flashmoe::cpu {

Memory::Memory(int64_t bytes) : bytes_(bytes) {
  void* data = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<std::byte*>(data);
}

Memory::~Memory() { munmap(data_, static_cast<size_t>(bytes_)); }

HeapGroup::HeapGroup(const core::Shape& shape, const core::Traffic& traffic)
    : shape_(shape), traffic_(traffic) {
  const core::HeapLayout layout(shape, traffic);
  for (int32_t pe = 0; pe < shape.num_pes; ++pe) heaps_.push_back(std::make_unique<Heap>(layout));
}

void HeapGroup::fail(const std::string& message) {
  {
    const std::lock_guard lock(mutex_);
    if (failure_.empty()) failure_ = message;
  }
  failed_.store(true);
  for (const auto& heap : heaps_) heap->doorbell().ring();
}

std::string HeapGroup::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

}  // namespace flashmoe::cpu
