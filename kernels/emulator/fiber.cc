#include "kernels/emulator/fiber.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#if defined(__x86_64__)
// The registers that a callee must preserve (System V ABI) are all that a switch has to save;
// swapcontext would also make a system call for the signal mask.
extern "C" void flashmoe_emulator_switch(void** from, void* to);
asm(R"(
.text
.align 16
.hidden flashmoe_emulator_switch
.globl flashmoe_emulator_switch
.type flashmoe_emulator_switch, @function
flashmoe_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size flashmoe_emulator_switch, .-flashmoe_emulator_switch
)");
#endif

namespace flashmoe::emulator {
namespace {

constexpr size_t kGuard = 65536;  // a multiple of every page size in use

}  // namespace

void switch_context(Context& from, Context& to) {
#if defined(__x86_64__)
  flashmoe_emulator_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.saved, &to.saved);
#endif
}

Stacks::Stacks() {
  void* begin = mmap(nullptr, kMaxStacks * kStride, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (begin == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  begin_ = reinterpret_cast<uintptr_t>(begin);
}

void Stacks::prepare(Context& context, size_t index, void (*entry)()) {
  for (; usable_ <= index; ++usable_) {
    void* stack = reinterpret_cast<void*>(begin_ + usable_ * kStride + kGuard);
    if (mprotect(stack, kStride - kGuard, PROT_READ | PROT_WRITE) != 0) {
      throw std::system_error(errno, std::generic_category(), "mprotect");
    }
  }
#if defined(__x86_64__)
  // Not all at the same distance from a page, so that they do not share a few lines of the cache.
  const uintptr_t top = begin_ + (index + 1) * kStride - index % 32 * 192;
  // Six registers, then where to return to; a function begins 8 bytes off a multiple of 16.
  void** slots = reinterpret_cast<void**>(top - 64);
  std::fill(slots, slots + 8, nullptr);
  std::memcpy(&slots[6], &entry, sizeof(entry));
  context.stack_pointer = slots;
#else
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = reinterpret_cast<void*>(begin_ + index * kStride + kGuard);
  context.saved.uc_stack.ss_size = kStride - kGuard;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
#endif
}

}  // namespace flashmoe::emulator
