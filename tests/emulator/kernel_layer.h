// Layers for the CUDA kernel, as its tests on the emulator and on a GPU want them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/core/types.h"
#include "kernels/cuda/call.h"
#include "kernels/cuda/configuration.h"
#include "tests/emulator/gate_reference.h"
#include "tests/native/harness.h"
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
      .exact = layer.factor_error == 0,
  };
}

inline cuda::Gate gate_of(const GateSizes& sizes) {
  return {
      .softmax = sizes.softmax,
      .renormalize = sizes.renormalize,
      .scaling_factor = sizes.scaling_factor,
      .num_groups = sizes.groups,
      .groups_per_token = sizes.groups_per_token,
  };
}

// A layer's problem whose tokens are those of gates, one for each PE, of the same sizes.
struct GatedProblem {
  Problem problem;
  std::vector<GateProblem> gates;

  GatedProblem(const Layer& layer, const GateSizes& sizes, uint64_t seed, Random& random)
      : problem(layer, Routing::kDistinct, seed) {
    for (Pe& pe : problem.pes) {
      const GateProblem& gate =
          gates.emplace_back(sizes, layer.dtype == core::DType::kFloat32, random);
      for (size_t i = 0; i < gate.x.size(); ++i) pe.x.set(static_cast<int64_t>(i), gate.x[i]);
    }
  }
};

}  // namespace flashmoe::testing
