// Runs a kernel without a GPU, under a scheduler that a seed decides, and checks what it does.
//
// How it works, from the bottom up:
//
// * Every CUDA thread is a fiber (fiber.h): a small stack and a saved stack pointer. All fibers of
// a
//   launch, which may be several thousand, live in the OS thread that called launch(). A fiber runs
//   until it calls a function of kernels/device, whose emulated body calls a hook (hooks.h). A hook
//   may block its fiber, and it may let another one run; who is next, the seed decides
//   (scheduler.cc). So may the moment at which something asynchronous takes effect: bytes of a
//   tma_load or an async_copy_16, an arrival that waits for them. Some seeds choose uniformly, some
//   starve a CTA or a warp of all CTAs, some follow priorities. The same seed gives the same run.
// * Plain loads and stores are seen because kernels are compiled with the instrumentation of the
//   thread sanitizer; tsan_runtime.cc is what it calls.
// * Every 4 bytes of shared and of registered global memory have a cell (shadow.h) that knows which
//   bytes were ever written, who wrote them last and who has read them since. "Before" is decided
//   by vector clocks (vector_clock.h): barriers, mbarriers and atomic accesses with their fences
//   pass on what a thread has seen, exactly as the PTX memory model says, and nothing else does.
//   Hence a race is reported although this one run may have gone well. A copy of the tensor memory
//   accelerator and a wgmma are not a part of the thread that issues them: they have an identity of
//   their own, which others come to know by the wait for them.
// * A put_signal has an identity that nobody knows until its signal is updated, then one of the
//   signal, which whoever calls acquire_puts of that comes to know; an ordinary acquire does not
//   do. So it is found whenever its bytes could be seen too early, its source be changed too early,
//   or another put's signal be taken for its own.
// * A thread has two clocks: what it has seen, and what of that is visible to the async proxy.
//   fence_proxy_async makes the second equal to the first. What tma_load and wgmma read must be in
//   the second.
// * Time is virtual. It advances with the hooks and jumps when all wait, so that a kernel's own
//   deadlines run out in no time.
//
// What is not seen: accesses inside memcpy and memset (kernels assign values instead), and accesses
// through pointers to memory that is neither shared nor a GlobalMemory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/emulator/hooks.h"

namespace flashmoe::emulator {

// What a kernel did wrong: who, what, where, and the seed that shows it again.
class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class GlobalMemory;

struct Launch {
  int blocks = 1;
  int threads = 32;  // of a CTA, a multiple of 32
  size_t shared_bytes = 0;
  uint64_t seed = 1;
  // The GPU on which each CTA runs; empty if there is one GPU. Scope::kGpu does not order accesses
  // of threads on different ones.
  std::vector<int> gpu_of_block{};
  // Each GPU has a grid of its own, as processes launch kernels: block_index and block_count are
  // those of the GPU's CTAs alone.
  bool grid_per_gpu = false;
  // By PE, which is a GPU: memory of equal size that puts reach.
  std::vector<const GlobalMemory*> symmetric{};
  // A launch that needs more hook calls or virtual time than this fails.
  uint64_t max_steps = 500'000'000;
  uint64_t max_nanoseconds = 1'000'000'000'000;
};

struct Outcome {
  uint64_t steps;        // hook calls
  uint64_t nanoseconds;  // virtual time
  uint64_t schedule;     // a hash of who ran when
};

// Called by all threads of a GPU between two kernels that its stream runs one after the other: the
// second begins when all CTAs have ended the first, sees all that they wrote, and finds its shared
// memory as it is at the start of a launch. Other GPUs do not wait.
void next_kernel();

// The GPU on which the calling thread runs.
int gpu_index();

// Runs `body` once per thread until all have returned. Throws Failure, or what the body threw. A
// launch that fails abandons its fibers: nothing on their stacks is destroyed.
Outcome launch(const Launch& launch, const std::function<void()>& body);

// A piece of global memory. Nothing else of it can be reached without an error.
class GlobalMemory {
 public:
  // Constant memory is never written by a kernel; such memory costs less to check.
  enum class Use { kMutable, kConstant };

  GlobalMemory(size_t bytes, std::string name, Use use = Use::kMutable);
  ~GlobalMemory();
  GlobalMemory(GlobalMemory&& other) noexcept;
  GlobalMemory(const GlobalMemory&) = delete;
  GlobalMemory& operator=(const GlobalMemory&) = delete;
  GlobalMemory& operator=(GlobalMemory&&) = delete;

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  template <typename T>
  std::span<const T> values() const {
    return {as<T>(), size_ / sizeof(T)};
  }

  // What the host does between launches. Memory that was never written holds NaN.
  void write(size_t offset, const void* source, size_t bytes);
  void fill(std::byte value);
  void mark_written(size_t offset, size_t bytes);  // after writes through data()

 private:
  std::byte* data_;
  size_t size_;
};

// Global memory that holds `values`.
template <typename T>
GlobalMemory global_memory(std::string name, const std::vector<T>& values,
                           GlobalMemory::Use use = GlobalMemory::Use::kMutable) {
  GlobalMemory memory(values.size() * sizeof(T), std::move(name), use);
  memory.write(0, values.data(), memory.size());
  return memory;
}

// How messages call a place of shared memory ("full" for the address of full[0]); for all launches
// that follow, until forget_shared_names.
void name_shared_memory(size_t offset, size_t bytes, size_t element_bytes, std::string name);
void forget_shared_names();

}  // namespace flashmoe::emulator
