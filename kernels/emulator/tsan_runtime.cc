// What code that is compiled with -fsanitize=thread calls at its loads and stores.
#include <cstddef>
#include <cstdint>

#include "kernels/emulator/machine.h"

namespace {

using flashmoe::emulator::machine;

inline void access(const void* address, size_t bytes, bool write, const void* place) {
  if (machine) machine->plain(reinterpret_cast<uintptr_t>(address), bytes, write, place);
}

}  // namespace

#define FLASHMOE_ACCESS(name, bytes, write)                          \
  [[gnu::visibility("default")]] void __tsan_##name(void* address) { \
    access(address, bytes, write, __builtin_return_address(0));      \
  }
#define FLASHMOE_ACCESSES(bytes)                       \
  FLASHMOE_ACCESS(read##bytes, bytes, false)           \
  FLASHMOE_ACCESS(write##bytes, bytes, true)           \
  FLASHMOE_ACCESS(unaligned_read##bytes, bytes, false) \
  FLASHMOE_ACCESS(unaligned_write##bytes, bytes, true) \
  FLASHMOE_ACCESS(volatile_read##bytes, bytes, false)  \
  FLASHMOE_ACCESS(volatile_write##bytes, bytes, true)

extern "C" {

FLASHMOE_ACCESSES(1)
FLASHMOE_ACCESSES(2)
FLASHMOE_ACCESSES(4)
FLASHMOE_ACCESSES(8)
FLASHMOE_ACCESSES(16)

[[gnu::visibility("default")]] void __tsan_read_range(void* address, size_t bytes) {
  access(address, bytes, false, __builtin_return_address(0));
}
[[gnu::visibility("default")]] void __tsan_write_range(void* address, size_t bytes) {
  access(address, bytes, true, __builtin_return_address(0));
}
// Objects with virtual functions live on stacks and in the host's memory.
[[gnu::visibility("default")]] void __tsan_vptr_update(void*, void*) {}
[[gnu::visibility("default")]] void __tsan_vptr_read(void*) {}
[[gnu::visibility("default")]] void __tsan_init() {}
[[gnu::visibility("default")]] void __tsan_func_entry(void*) {}
[[gnu::visibility("default")]] void __tsan_func_exit() {}

}  // extern "C"

#undef FLASHMOE_ACCESSES
#undef FLASHMOE_ACCESS
