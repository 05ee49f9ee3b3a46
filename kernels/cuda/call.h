// What one call of the operator is given: how it computes, and the memory of each PE that takes
// part.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/core/types.h"
#include "kernels/cuda/workspace.h"

namespace flashmoe::cuda {

// The memory of a PE that outlives a launch.
struct PePlace {
  std::byte* workspace;
  ErrorRecord* error;  // as the GPU addresses it
};

// The gate inside the kernel, equal on all PEs.
struct Gate {
  bool softmax;  // else sigmoid
  bool renormalize;
  float scaling_factor;
  int32_t num_groups;
  int32_t groups_per_token;
};

// The buffers of one PE. Parts that a layer does not have are null. The routing is an input when
// the caller gives it, and a result when the gate makes it.
struct PeBuffers {
  const void* x;                // [T, H]
  const void* gate;             // [El, H, D]
  const void* up;               // [El, H, D]
  const void* down;             // [El, D, H]
  const void* gate_bias;        // [El, D]
  const void* up_bias;          // [El, D]
  const void* down_bias;        // [El, H]
  int32_t* indices;             // [T, K]; only read when the caller gives it
  float* weights;               // [T, K]; only read when the caller gives it
  const float* router;          // [H, E]; this and what follows only with the gate
  const float* selection_bias;  // [E]
  const uint8_t* mask;          // [T]
  float* logits;                // [T, E], a result
  void* y;                      // [T, H]
  int32_t* dropped;             // [1]
  bool absent;                  // for tests: a PE that never enters
};

struct Call {
  core::Activation activation;
  uint32_t tag;        // equal on all PEs in the same call
  double deadline;     // of every wait, seconds
  bool check_weights;  // a slot weight that is not finite is an error
  const Gate* gate;    // or null: the caller gives the routing
};

}  // namespace flashmoe::cuda
