// What the tile engines share.
//
// An engine brings the operands of a product through a ring of stages in shared memory: its
// Producer fills a stage when all math warps have released it, its Consumer multiplies a stage when
// it is full. Both walk the ring in the same order and go on from one product to the next.
//
// The results are m16n8 fragments, the unit of the tensor cores (PTX ISA, "Matrix Fragments for
// mma.m16n8k16"): accumulators[m][c][n][i] of a lane of a math warp is
//   row     first_row(warp, m) + lane / 4 + 8 * (i / 2)                           of the tile,
//   column  first_column(warp, c) + 8 * n + 2 * (lane % 4) + i % 2    of chunk(warp, c).
// Chunks 2q and 2q + 1 of the tile are chunks 2r and 2r + 1 of the same warps, with the same
// columns, so that a gate and the value that it gates are in the same thread.
#pragma once

#include <bit>
#include <cstdint>

#include "kernels/device/body.h"

namespace flashmoe::cuda {

// The box that one TMA copy takes of a tensor, in elements, innermost first. Its innermost side is
// 128 bytes and lands with the 128-byte swizzle (kernels/device/tma.h).
struct TensorBox {
  uint32_t size[3];
};

// A place in the endless walk round the stages; value-initialise it to start.
template <int kStages>
struct PipelinePosition {
  static_assert(std::has_single_bit(unsigned{kStages}));

  uint32_t steps = 0;

  FLASHMOE_DEVICE int stage() const { return static_cast<int>(steps % kStages); }
  // The parity of the phase whose end makes the stage full. A stage that nobody has used yet is
  // empty: a fresh barrier lets waiters for parity 1 pass.
  FLASHMOE_DEVICE uint32_t full_parity() const { return steps / kStages % 2; }
  FLASHMOE_DEVICE uint32_t empty_parity() const { return full_parity() ^ 1; }

  FLASHMOE_DEVICE void advance() { ++steps; }
};

}  // namespace flashmoe::cuda
