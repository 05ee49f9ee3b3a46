// The sizes of one call of the operator, equal on every PE of an expert group.
#pragma once

#include <cstdint>

#include "kernels/core/host_device.h"

namespace flashmoe::core {

FLASHMOE_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FLASHMOE_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// No limit on the rows that one expert keeps.
inline constexpr int64_t kNoCapacity = -1;

struct Shape {
  int32_t num_pes;            // P
  int32_t tokens;             // T, of one PE
  int32_t hidden;             // H
  int32_t intermediate;       // D
  int32_t num_experts;        // E, of all PEs; divisible by P
  int32_t experts_per_token;  // K
  int64_t capacity;           // rows an expert keeps, or kNoCapacity
  int64_t max_rows;           // rows a PE accepts in one epoch, alignment not counted
  int32_t block_rows;         // rows of one row block (kBlockM)
  int32_t block_tokens;       // tokens of one combine block (kBlockT)
  int32_t block_columns;      // output columns of one tile

  FLASHMOE_HOST_DEVICE int32_t local_experts() const { return num_experts / num_pes; }
  FLASHMOE_HOST_DEVICE int64_t slots() const { return int64_t{tokens} * experts_per_token; }

  // Rows of the receive buffer (R). Every expert starts on a row block of its own, so each expert
  // that got a row can leave up to block_rows - 1 rows unused; the sum is whole row blocks.
  FLASHMOE_HOST_DEVICE int64_t recv_rows() const {
    const int64_t used = local_experts() < max_rows ? local_experts() : max_rows;
    return (max_rows + used * (block_rows - 1)) / block_rows * block_rows;
  }
  FLASHMOE_HOST_DEVICE int64_t row_blocks() const { return recv_rows() / block_rows; }
  FLASHMOE_HOST_DEVICE int64_t token_blocks() const { return ceil_div(tokens, block_tokens); }

  // Column tiles of a product whose result is D (intermediate) or H (hidden) wide.
  FLASHMOE_HOST_DEVICE int32_t intermediate_tiles() const {
    return static_cast<int32_t>(ceil_div(intermediate, block_columns));
  }
  FLASHMOE_HOST_DEVICE int32_t hidden_tiles() const {
    return static_cast<int32_t>(ceil_div(hidden, block_columns));
  }

  friend bool operator==(const Shape&, const Shape&) = default;
};

}  // namespace flashmoe::core
