// Memory that several threads touch without a barrier between them: atomic accesses with an order
// and a scope, and fences (PTX ISA, "Memory Consistency Model", `ld`, `st`, `red`, `atom`,
// `fence`). T is a 32- or 64-bit unsigned integer.
#pragma once

#include "kernels/device/body.h"

namespace flashmoe::device {

// Who takes part: threads of this GPU, or those of all GPUs and the host.
enum class Scope { kGpu, kSystem };

namespace internal {

template <typename T>
concept Word = sizeof(T) == 4 || sizeof(T) == 8;

#if FLASHMOE_EMULATED
constexpr emulator::Scope emulated(Scope scope) {
  return scope == Scope::kGpu ? emulator::Scope::kGpu : emulator::Scope::kSystem;
}
#endif

}  // namespace internal

#if FLASHMOE_EMULATED
#define FLASHMOE_LOAD(name, order, emulated_order)                                              \
  template <Scope kScope, internal::Word T>                                                     \
  FLASHMOE_DEVICE T name(const T* address) {                                                    \
    return static_cast<T>(                                                                      \
        emulator::atomic_load(address, sizeof(T), emulated_order, internal::emulated(kScope))); \
  }
#define FLASHMOE_STORE(name, order, emulated_order)                                                \
  template <Scope kScope, internal::Word T>                                                        \
  FLASHMOE_DEVICE void name(T* address, T value) {                                                 \
    emulator::atomic_store(address, sizeof(T), value, emulated_order, internal::emulated(kScope)); \
  }
#define FLASHMOE_FETCH_ADD(name, order, emulated_order)                                   \
  template <Scope kScope, internal::Word T>                                               \
  FLASHMOE_DEVICE T name(T* address, T value) {                                           \
    return static_cast<T>(emulator::atomic_add(address, sizeof(T), value, emulated_order, \
                                               internal::emulated(kScope)));              \
  }
#else
#define FLASHMOE_LOAD(name, order, emulated_order)           \
  template <Scope kScope, internal::Word T>                  \
  FLASHMOE_DEVICE T name(const T* address) {                 \
    T value;                                                 \
    if constexpr (sizeof(T) == 4 && kScope == Scope::kGpu) { \
      asm volatile("ld." order ".gpu.global.u32 %0, [%1];"   \
                   : "=r"(value)                             \
                   : "l"(address)                            \
                   : "memory");                              \
    } else if constexpr (sizeof(T) == 4) {                   \
      asm volatile("ld." order ".sys.global.u32 %0, [%1];"   \
                   : "=r"(value)                             \
                   : "l"(address)                            \
                   : "memory");                              \
    } else if constexpr (kScope == Scope::kGpu) {            \
      asm volatile("ld." order ".gpu.global.u64 %0, [%1];"   \
                   : "=l"(value)                             \
                   : "l"(address)                            \
                   : "memory");                              \
    } else {                                                 \
      asm volatile("ld." order ".sys.global.u64 %0, [%1];"   \
                   : "=l"(value)                             \
                   : "l"(address)                            \
                   : "memory");                              \
    }                                                        \
    return value;                                            \
  }
#define FLASHMOE_STORE(name, order, emulated_order)                                                \
  template <Scope kScope, internal::Word T>                                                        \
  FLASHMOE_DEVICE void name(T* address, T value) {                                                 \
    if constexpr (sizeof(T) == 4 && kScope == Scope::kGpu) {                                       \
      asm volatile("st." order ".gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory"); \
    } else if constexpr (sizeof(T) == 4) {                                                         \
      asm volatile("st." order ".sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory"); \
    } else if constexpr (kScope == Scope::kGpu) {                                                  \
      asm volatile("st." order ".gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory"); \
    } else {                                                                                       \
      asm volatile("st." order ".sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory"); \
    }                                                                                              \
  }
#define FLASHMOE_FETCH_ADD(name, order, emulated_order)              \
  template <Scope kScope, internal::Word T>                          \
  FLASHMOE_DEVICE T name(T* address, T value) {                      \
    T before;                                                        \
    if constexpr (sizeof(T) == 4 && kScope == Scope::kGpu) {         \
      asm volatile("atom." order ".gpu.global.add.u32 %0, [%1], %2;" \
                   : "=r"(before)                                    \
                   : "l"(address), "r"(value)                        \
                   : "memory");                                      \
    } else if constexpr (sizeof(T) == 4) {                           \
      asm volatile("atom." order ".sys.global.add.u32 %0, [%1], %2;" \
                   : "=r"(before)                                    \
                   : "l"(address), "r"(value)                        \
                   : "memory");                                      \
    } else if constexpr (kScope == Scope::kGpu) {                    \
      asm volatile("atom." order ".gpu.global.add.u64 %0, [%1], %2;" \
                   : "=l"(before)                                    \
                   : "l"(address), "l"(value)                        \
                   : "memory");                                      \
    } else {                                                         \
      asm volatile("atom." order ".sys.global.add.u64 %0, [%1], %2;" \
                   : "=l"(before)                                    \
                   : "l"(address), "l"(value)                        \
                   : "memory");                                      \
    }                                                                \
    return before;                                                   \
  }
#endif

FLASHMOE_LOAD(load_relaxed, "relaxed", emulator::Order::kRelaxed)
FLASHMOE_LOAD(load_acquire, "acquire", emulator::Order::kAcquire)
FLASHMOE_STORE(store_relaxed, "relaxed", emulator::Order::kRelaxed)
FLASHMOE_STORE(store_release, "release", emulator::Order::kRelease)
FLASHMOE_FETCH_ADD(fetch_add_relaxed, "relaxed", emulator::Order::kRelaxed)
FLASHMOE_FETCH_ADD(fetch_add_acquire_release, "acq_rel", emulator::Order::kAcquireRelease)

#undef FLASHMOE_LOAD
#undef FLASHMOE_STORE
#undef FLASHMOE_FETCH_ADD

// Adds without reading, so that nobody waits for the answer (`red`).
template <Scope kScope, internal::Word T>
FLASHMOE_DEVICE void add_relaxed(T* address, T value) {
#if FLASHMOE_EMULATED
  emulator::atomic_add(address, sizeof(T), value, emulator::Order::kRelaxed,
                       internal::emulated(kScope));
#else
  if constexpr (sizeof(T) == 4 && kScope == Scope::kGpu) {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("red.relaxed.sys.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
  } else if constexpr (kScope == Scope::kGpu) {
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
  } else {
    asm volatile("red.relaxed.sys.global.add.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
  }
#endif
}

// Replaces `expected` by `value`; returns what was there.
template <Scope kScope, internal::Word T>
FLASHMOE_DEVICE T compare_exchange(T* address, T expected, T value) {
#if FLASHMOE_EMULATED
  return static_cast<T>(emulator::atomic_compare_exchange(address, sizeof(T), expected, value,
                                                          emulator::Order::kAcquireRelease,
                                                          internal::emulated(kScope)));
#else
  T before;
  if constexpr (sizeof(T) == 4 && kScope == Scope::kGpu) {
    asm volatile("atom.acq_rel.gpu.global.cas.b32 %0, [%1], %2, %3;"
                 : "=r"(before)
                 : "l"(address), "r"(expected), "r"(value)
                 : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("atom.acq_rel.sys.global.cas.b32 %0, [%1], %2, %3;"
                 : "=r"(before)
                 : "l"(address), "r"(expected), "r"(value)
                 : "memory");
  } else if constexpr (kScope == Scope::kGpu) {
    asm volatile("atom.acq_rel.gpu.global.cas.b64 %0, [%1], %2, %3;"
                 : "=l"(before)
                 : "l"(address), "l"(expected), "l"(value)
                 : "memory");
  } else {
    asm volatile("atom.acq_rel.sys.global.cas.b64 %0, [%1], %2, %3;"
                 : "=l"(before)
                 : "l"(address), "l"(expected), "l"(value)
                 : "memory");
  }
  return before;
#endif
}

// Orders this thread's accesses before it (and what it has observed) with its relaxed atomics
// after it, and the other way round: `fence.acq_rel`.
template <Scope kScope>
FLASHMOE_DEVICE void fence() {
#if FLASHMOE_EMULATED
  emulator::fence(internal::emulated(kScope));
#else
  if constexpr (kScope == Scope::kGpu) {
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
  } else {
    asm volatile("fence.acq_rel.sys;" ::: "memory");
  }
#endif
}

// Orders accesses through the generic proxy (ordinary loads and stores) with those of the async
// proxy (bulk copies, TMA, wgmma operands) (PTX ISA, "Proxies", `fence.proxy.async`). Older
// architectures than sm_90 have no such proxy.
FLASHMOE_DEVICE void fence_proxy_async() {
#if FLASHMOE_EMULATED
  emulator::fence_proxy_async();
#elif __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

}  // namespace flashmoe::device
