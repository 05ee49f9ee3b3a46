// Warp-level tensor-core products and the loads that feed them (PTX ISA, "Warp-level Matrix
// Multiply-Accumulate Instructions"; sm_80). Executed by all lanes of a warp.
#pragma once

#include <bit>
#include <type_traits>

#include "kernels/core/types.h"
#include "kernels/device/body.h"

namespace flashmoe::device {

// d += a b for a [16][k] and b [k][8]: k is 16 for BFloat16 and Float16, 8 for float, of which the
// hardware reads the 19 bits of a tf32 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with
// floating point type", "Matrix Fragments for mma.m16n8k8"). With group = lane / 4 and member =
// lane % 4, and p the number of elements in 4 bytes:
//   a[i]  row group + 8 * (i % 2), depth p * member + 4 * p * (i / 2), and the next one if p is 2
//   b[i]  column group, depth p * member + 4 * p * i, and the next one if p is 2
//   d[i]  row group + 8 * (i / 2), column 2 * member + i % 2
template <typename Element>
FLASHMOE_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<Element, core::BFloat16> || std::is_same_v<Element, core::Float16> ||
                std::is_same_v<Element, float>);
#if FLASHMOE_EMULATED
  constexpr emulator::MmaType kType =
      std::is_same_v<Element, core::BFloat16>  ? emulator::MmaType::kBFloat16
      : std::is_same_v<Element, core::Float16> ? emulator::MmaType::kFloat16
                                               : emulator::MmaType::kTf32;
  emulator::mma_sync(kType, d, a, b);
#else
  if constexpr (std::is_same_v<Element, core::BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<Element, core::Float16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// Four matrices of 8 rows of 16 bytes (PTX ISA, `ldmatrix`). Lane i gives the shared address, a
// multiple of 16, of row i % 8 of matrix i / 8, and gets the 4 bytes lane % 4 of row lane / 4 of
// matrix j in r[j]. Transposed, of 2-byte elements, it gets those at column lane / 4 of rows
// 2 * (lane % 4) and the next.
template <bool kTransposed>
FLASHMOE_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
#if FLASHMOE_EMULATED
  emulator::ldmatrix(r, row, kTransposed);
#else
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
#endif
}

// The float of these bits, such as those of a fragment that load_matrices brought.
FLASHMOE_DEVICE float as_float(uint32_t bits) {
#if FLASHMOE_EMULATED
  return std::bit_cast<float>(bits);
#else
  return __uint_as_float(bits);
#endif
}

// The bits of the nearest tf32, ties away from zero (PTX ISA, `cvt.rna.tf32.f32`): a float whose
// low 13 bits are to be ignored.
FLASHMOE_DEVICE uint32_t to_tf32(float x) {
#if FLASHMOE_EMULATED
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & ~0x1fffu : bits;
#else
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
#endif
}

}  // namespace flashmoe::device
