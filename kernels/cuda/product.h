// What a tile computes before its epilogue: a block of rows times columns of one expert's weights.
// The two tile engines (engine_sm90.h, engine_sm80.h) take it and share everything else.
#pragma once

#include <cstdint>

#include "kernels/device/tma.h"

namespace flashmoe::cuda {

// Columns of a tile come in chunks of this many. With a gate, even chunks are columns of the gate
// and odd ones the same columns of the up-projection, so that both sit in the same threads.
inline constexpr int kChunkColumns = 64;

// A row-major tensor in global memory: [rows][columns], or [El][rows][columns] of weights.
struct Operand {
  const void* data;
  const device::TensorMap* map;  // box: 64 x 64 of weights, depth-first lines of 64 x kBlockRows
                                 // of rows; only read by the sm_90a engine
};

struct Product {
  Operand rows;       // [R][depth]
  int32_t row;        // the first row of the block
  int32_t row_count;  // rows of it that exist, 1 to kBlockRows; results of others are not used
  Operand even;       // weights [El][depth][width] of the even chunks
  Operand odd;        // and of the odd chunks: the same tensor, or gate (even) and up (odd)
  int32_t expert;     // local
  int32_t depth;      // any multiple of 16 bytes; need not be a multiple of a stage's depth
  int32_t width;      // any multiple of 16 bytes; chunks may begin at or beyond it (zeros)
  int32_t column;     // the first column of chunk 0
  bool gated;         // whether even and odd differ

  FLASHMOE_DEVICE const Operand& weights(int chunk) const { return chunk % 2 == 0 ? even : odd; }
  // The first column of a chunk.
  FLASHMOE_DEVICE int32_t first_column(int chunk) const {
    return column + (gated ? chunk / 2 : chunk) * kChunkColumns;
  }
};

}  // namespace flashmoe::cuda
