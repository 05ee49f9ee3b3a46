// Layers for the CUDA kernel, as its tests on the emulator and on a GPU want them.
#pragma once

#include <cstdint>

#include "kernels/core/types.h"
#include "kernels/cuda/configuration.h"
#include "tests/native/problem.h"

namespace flashmoe::testing {

struct LayerSizes {
  int32_t pes, tokens, hidden, intermediate, experts, experts_per_token;
};

// Without a bound on rows. The sizes of tiles are the kernel's own.
inline Layer kernel_layer(const LayerSizes& sizes, core::DType dtype, bool gated, bool biased,
                          core::Activation activation) {
  Layer layer{};
  layer.shape = core::Shape{
      .num_pes = sizes.pes,
      .tokens = sizes.tokens,
      .hidden = sizes.hidden,
      .intermediate = sizes.intermediate,
      .num_experts = sizes.experts,
      .experts_per_token = sizes.experts_per_token,
      .capacity = core::kNoCapacity,
      .max_rows = int64_t{sizes.pes} * sizes.tokens * sizes.experts_per_token,
      .block_rows = 128,
      .block_tokens = 1,
      .block_columns = 128,
  };
  layer.dtype = dtype;
  layer.gated = gated;
  layer.biased = biased;
  layer.activation = activation;
  return layer;
}

inline cuda::CallSizes sizes_of(const Layer& layer) {
  const core::Shape& shape = layer.shape;
  return {
      .num_pes = shape.num_pes,
      .tokens = shape.tokens,
      .hidden = shape.hidden,
      .intermediate = shape.intermediate,
      .num_experts = shape.num_experts,
      .experts_per_token = shape.experts_per_token,
      .capacity = shape.capacity,
      .max_rows = shape.max_rows,
      .dtype = layer.dtype,
      .exact = true,
  };
}

}  // namespace flashmoe::testing
