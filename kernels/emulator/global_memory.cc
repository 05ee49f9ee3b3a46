#include <cstring>
#include <utility>

#include "kernels/emulator/emulator.h"
#include "kernels/emulator/memory.h"

namespace flashmoe::emulator {

GlobalMemory::GlobalMemory(size_t bytes, std::string name, Use use)
    : data_(Memory::instance().allocate(bytes, std::move(name), use == Use::kConstant)),
      size_(bytes) {}

GlobalMemory::~GlobalMemory() {
  if (data_) Memory::instance().free(data_);
}

GlobalMemory::GlobalMemory(GlobalMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

void GlobalMemory::write(size_t offset, const void* source, size_t bytes) {
  std::memcpy(data_ + offset, source, bytes);
  mark_written(offset, bytes);
}

void GlobalMemory::fill(std::byte value) {
  std::memset(data_, static_cast<int>(value), size_);
  mark_written(0, size_);
}

void GlobalMemory::mark_written(size_t offset, size_t bytes) {
  Memory::instance().mark_written(data_ + offset, bytes);
}

}  // namespace flashmoe::emulator
