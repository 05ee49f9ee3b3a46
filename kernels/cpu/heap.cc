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

void prepare_to_write(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  // Advice only: where it is refused, small pages do.
  if (data != nullptr && begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

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
