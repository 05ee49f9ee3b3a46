// Fibers: stacks of their own, and the switch from one to another.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace flashmoe::emulator {

// Where a fiber, or the thread that runs fibers, was left.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t saved;
#endif
};

// Saves where the caller is in `from` and goes on where `to` was left.
void switch_context(Context& from, Context& to);

// The stacks of all fibers, in one range of addresses, each with an inaccessible page below it.
// They are kept for the next launch.
class Stacks {
 public:
  // 64 CTAs of 384 threads. A stack is two mappings, and Linux lets a process have 65530.
  static constexpr size_t kMaxStacks = size_t{64} * 384;
  static constexpr size_t kStride = 128 * 1024;  // a stack and its guard page

  Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  // Makes `context` begin with `entry`, which never returns, on stack `index`.
  void prepare(Context& context, size_t index, void (*entry)());
  bool contains(uintptr_t address) const { return address - begin_ < kMaxStacks * kStride; }

 private:
  uintptr_t begin_;
  size_t usable_ = 0;  // stacks that are accessible already
};

}  // namespace flashmoe::emulator
