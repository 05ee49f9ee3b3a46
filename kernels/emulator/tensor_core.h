// What the tensor-core instructions compute, as pure functions of registers and shared memory. When
// an instruction may read and when its results appear is the business of those who call them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/emulator/hooks.h"

namespace flashmoe::emulator {

// The place of an element in its matrix: of a, row and depth; of b, depth and column; of d, row and
// column.
struct MatrixPlace {
  int row;
  int column;
  bool operator==(const MatrixPlace&) const = default;
};

// Depth of one mma, and elements in a register.
constexpr int mma_depth(MmaType type) { return type == MmaType::kTf32 ? 8 : 16; }
constexpr int elements_per_register(MmaType type) { return type == MmaType::kTf32 ? 1 : 2; }

// The element of a lane's register `index`: its low (element 0) or high half (element 1) for the
// 16-bit types (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", "Matrix
// Fragments for mma.m16n8k8").
MatrixPlace mma_a_place(MmaType type, int lane, int index, int element);
MatrixPlace mma_b_place(MmaType type, int lane, int index, int element);
MatrixPlace mma_d_place(int lane, int index);
// Of a thread of a warpgroup (PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16").
MatrixPlace wgmma_d_place(int thread, int index);

// Element [l] is what lane l of the warp holds.
template <typename T, size_t kRegisters>
using WarpRegisters = std::array<std::array<T, kRegisters>, 32>;

// d += a b. Of a tf32 the low 13 bits are ignored. As on Ampere, half of the depth is summed at
// once, and what does not fit a float is cut, not rounded (Fasi et al., "Numerical behavior of
// NVIDIA tensor cores", PeerJ Computer Science 7:e330, 2021): deep sums drift towards zero.
void mma_warp(MmaType type, WarpRegisters<float, 4>& d, const WarpRegisters<uint32_t, 4>& a,
              const WarpRegisters<uint32_t, 2>& b);

// `rows[l]` are the 16 bytes whose address lane l gives.
WarpRegisters<uint32_t, 4> ldmatrix_warp(const std::array<const std::byte*, 32>& rows,
                                         bool transpose);

// A wgmma operand in shared memory (PTX ISA, "Matrix Descriptor Format"), in bytes.
struct WgmmaOperand {
  uint32_t start;
  uint32_t leading_bytes;
  uint32_t stride_bytes;
  // With the 128-byte swizzle, the only one known here; `transposed` is MN-major. Throws
  // std::invalid_argument for a descriptor that is not so.
  static WgmmaOperand decode(uint64_t descriptor);
  // The offset in shared memory of a 16-bit element, given its row (of a) or column (of b) and its
  // depth (PTX ISA, "Canonical Layouts").
  uint32_t offset(int row_or_column, int depth, bool transposed) const;
};

struct WgmmaInstruction {
  MmaType type;
  int columns;
  uint64_t a_descriptor;
  uint64_t b_descriptor;
  bool a_transposed;
  bool b_transposed;
  bool operator==(const WgmmaInstruction&) const = default;
};

struct ByteRange {
  uint32_t begin;
  uint32_t end;
  bool operator==(const ByteRange&) const = default;
};

// The parts of shared memory that the instruction reads, ascending and not adjacent. Throws
// std::out_of_range if it reads beyond what a descriptor can name (256 KiB).
std::vector<ByteRange> wgmma_reads(const WgmmaInstruction& instruction);

// d [64][columns] += a b, with sums that are rounded, not cut: the same in the 16 bits of its
// factors, and much faster here. Throws std::out_of_range if it reads outside `shared`.
void wgmma_multiply(const WgmmaInstruction& instruction, std::span<const std::byte> shared,
                    float* d);

// Between d [64][columns] and the columns / 2 accumulators of each thread of the warpgroup.
void wgmma_scatter(int columns, const float* d, std::span<float* const, 128> accumulators);
void wgmma_gather(int columns, std::span<float* const, 128> accumulators, float* d);

}  // namespace flashmoe::emulator
