// The tile sizes of the engine.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/core/shape.h"

namespace flashmoe::cpu {

inline constexpr int32_t kBlockTokens = 32;
inline constexpr int32_t kBlockColumns = 512;

// Rows of a row block: half as many again as an expert gets on average, so that most experts need
// one only. A second one, of few rows, would read all of the expert's weights again. But every
// expert leaves up to a block of memory unused, so blocks are small where experts get few rows; and
// not too small, lest a favoured expert have many of them.
inline int32_t block_rows(int32_t num_pes, int32_t tokens, int32_t num_experts,
                          int32_t experts_per_token) {
  constexpr int64_t kLeast = 64, kMost = 256;
  const int64_t slots = int64_t{num_pes} * tokens * experts_per_token;
  const int64_t rows = core::round_up(core::ceil_div(3 * slots, 2 * num_experts), kLeast);
  return static_cast<int32_t>(std::clamp(rows, kLeast, kMost));
}

}  // namespace flashmoe::cpu
