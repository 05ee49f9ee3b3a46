// Asynchronous tensor-core products of a warpgroup with both operands in shared memory (PTX ISA,
// "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions"; sm_90a). Executed by all
// warps of a warpgroup; the operands are read through the async proxy.
#pragma once

#include <type_traits>

#include "kernels/core/types.h"
#include "kernels/device/body.h"

namespace flashmoe::device {

// Where an operand lies in shared memory, with the 128-byte swizzle of tma.h (PTX ISA, "Matrix
// Descriptor Format", "Canonical Layouts").
struct WgmmaDescriptor {
  uint64_t bits;

  // The operand `bytes`, a multiple of 16, further on.
  FLASHMOE_DEVICE WgmmaDescriptor plus(uint32_t bytes) const { return {bits + (bytes >> 4)}; }
};

namespace internal {

FLASHMOE_DEVICE WgmmaDescriptor wgmma_descriptor(const void* shared, uint32_t leading_bytes,
                                                 uint32_t stride_bytes) {
  constexpr uint64_t kSwizzle128Bytes = uint64_t{1} << 62;
#if FLASHMOE_EMULATED
  const uint32_t address = emulator::shared_offset(shared);
#else
  const uint32_t address = shared_address(shared);
#endif
  return {kSwizzle128Bytes | uint64_t{stride_bytes >> 4} << 32 |
          uint64_t{leading_bytes >> 4} << 16 | (address & 0x3ffffu) >> 4};
}

}  // namespace internal

// Rows of 64 elements of depth (128 bytes), one after the other: what TMA writes for a box 64
// elements deep. 16 elements further in depth is 32 bytes further on. Row 0 is at a multiple of
// 1024.
FLASHMOE_DEVICE WgmmaDescriptor k_major_descriptor(const void* shared) {
  return internal::wgmma_descriptor(shared, 16, 1024);
}

// Lines of 64 columns (128 bytes), one after the other in depth: what TMA writes for a box 64
// columns wide. The next 64 columns are `chunk_bytes` further on, and 16 elements further in depth
// is 2048 bytes further on. Line 0 is at a multiple of 1024.
FLASHMOE_DEVICE WgmmaDescriptor mn_major_descriptor(const void* shared, uint32_t chunk_bytes) {
  return internal::wgmma_descriptor(shared, chunk_bytes, 1024);
}

// Orders the warpgroup's accesses to its accumulators before the products that follow. Also needed
// before the first of them (PTX ISA, `wgmma.fence`).
FLASHMOE_DEVICE void wgmma_fence() {
#if FLASHMOE_EMULATED
  emulator::wgmma_fence();
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Makes a group of the products since the last one (PTX ISA, `wgmma.commit_group`).
FLASHMOE_DEVICE void wgmma_commit() {
#if FLASHMOE_EMULATED
  emulator::wgmma_commit();
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most `kPending` of the latest groups are unfinished (PTX ISA, `wgmma.wait_group`).
// The operands of the others may then be overwritten.
template <int kPending>
FLASHMOE_DEVICE void wgmma_wait() {
#if FLASHMOE_EMULATED
  emulator::wgmma_wait(kPending);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Waits for all groups; the accumulators may then be used. The compiler does not know that the
// wait writes them: they are operands after it, so that it moves no use of them to before it.
template <int kRegisters>
FLASHMOE_DEVICE void wgmma_finish(float (&accumulators)[kRegisters]) {
  wgmma_wait<0>();
#if FLASHMOE_EMULATED
  static_cast<void>(accumulators);
#else
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(accumulators[i])::"memory");
#endif
}

#define FLASHMOE_WGMMA_128(type)                                                                   \
  asm volatile(                                                                                    \
      "{ .reg .pred p; setp.ne.b32 p, %66, 0;"                                                     \
      " wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                \
      " {"                                                                                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "           \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "           \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63},"           \
      " %64, %65, p, 1, 1, 0, 1; }"                                                                \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),        \
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),    \
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), \
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), \
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), \
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), \
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), \
        "+f"(d[63])                                                                                \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate))                                          \
      : "memory")
#define FLASHMOE_WGMMA_256(type)                                                                   \
  asm volatile(                                                                                    \
      "{ .reg .pred p; setp.ne.b32 p, %130, 0;"                                                    \
      " wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                \
      " {"                                                                                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "           \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "           \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "           \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "           \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "     \
      "%111, "                                                                                     \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
      "%127},"                                                                                     \
      " %128, %129, p, 1, 1, 0, 1; }"                                                              \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),        \
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),    \
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), \
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), \
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), \
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), \
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), \
        "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), \
        "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), \
        "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), \
        "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), \
        "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]), \
        "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),          \
        "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]),        \
        "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]),        \
        "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]),        \
        "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])         \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate))                                          \
      : "memory")

// Begins d = a b, or d += a b with `accumulate`, for a [64][16], K-major, and b [16][kColumns],
// MN-major. d[4 * j + i] of lane l of warp w of the warpgroup is row 16 * w + l / 4 + 8 * (i / 2),
// column 8 * j + 2 * (l % 4) + i % 2 (PTX ISA, `wgmma.mma_async`, "Matrix Fragments for
// wgmma.mma_async.m64nNk16").
template <typename Element, int kColumns>
FLASHMOE_DEVICE void wgmma(float (&d)[kColumns / 2], WgmmaDescriptor a_descriptor,
                           WgmmaDescriptor b_descriptor, bool accumulate) {
  static_assert(std::is_same_v<Element, core::BFloat16> || std::is_same_v<Element, core::Float16>);
  static_assert(kColumns == 128 || kColumns == 256);
  [[maybe_unused]] constexpr bool kBFloat16 = std::is_same_v<Element, core::BFloat16>;
#if FLASHMOE_EMULATED
  emulator::wgmma(kBFloat16 ? emulator::MmaType::kBFloat16 : emulator::MmaType::kFloat16, d,
                  kColumns, a_descriptor.bits, b_descriptor.bits, false, true, accumulate);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const uint64_t a = a_descriptor.bits;
  const uint64_t b = b_descriptor.bits;
  if constexpr (kColumns == 128 && kBFloat16) {
    FLASHMOE_WGMMA_128("bf16");
  } else if constexpr (kColumns == 128) {
    FLASHMOE_WGMMA_128("f16");
  } else if constexpr (kBFloat16) {
    FLASHMOE_WGMMA_256("bf16");
  } else {
    FLASHMOE_WGMMA_256("f16");
  }
#endif
}

#undef FLASHMOE_WGMMA_128
#undef FLASHMOE_WGMMA_256

}  // namespace flashmoe::device
