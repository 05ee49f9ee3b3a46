// What a call of the operator is given: sizes, options, and the buffers of one PE.
#pragma once

#include <chrono>
#include <cstdint>

#include "kernels/core/heap_layout.h"
#include "kernels/core/shape.h"
#include "kernels/cpu/activation.h"
#include "kernels/cpu/storage.h"

namespace flashmoe::cpu {

// Equal on all PEs of a group.
struct CallConfig {
  core::Shape shape;
  core::Traffic traffic;
  DType dtype;
  Activation activation;
  uint32_t tag;                       // of the call site
  std::chrono::nanoseconds deadline;  // of every wait
  bool check_weights;                 // a slot weight that is not finite is an error

  friend bool operator==(const CallConfig&, const CallConfig&) = default;
};

// Local experts, El = E / P. Absent parts are null: gate if the FFN is not gated, biases.
struct ExpertWeights {
  const void* gate;       // [El, H, D]
  const void* up;         // [El, H, D]
  const void* down;       // [El, D, H]
  const void* gate_bias;  // [El, D]
  const void* up_bias;    // [El, D]
  const void* down_bias;  // [El, H]
};

struct RoutedTokens {
  const void* x;           // [T, H]
  const int32_t* indices;  // [T, K], -1 masks a slot
  const float* weights;    // [T, K]
};

// Received rows and pre-activations, kept by forward for backward. Null where they are not kept.
// Only the rows that the plan uses are written.
template <typename Pointer>
struct Residuals {
  Pointer rows;      // [R, H]
  Pointer pre_gate;  // [R, D]
  Pointer pre_up;    // [R, D]
};

struct ForwardBuffers {
  RoutedTokens tokens;
  ExpertWeights experts;
  void* y;           // [T, H]
  int32_t* dropped;  // [1] slots of this PE that were dropped
  Residuals<void*> kept;
};

// Gradients of the local experts, laid out as ExpertWeights; null where that is.
struct ExpertGradients {
  void* gate;
  void* up;
  void* down;
  void* gate_bias;
  void* up_bias;
  void* down_bias;
};

struct BackwardBuffers {
  RoutedTokens tokens;
  ExpertWeights experts;
  Residuals<const void*> kept;
  const void* dy;    // [T, H]
  void* dx;          // [T, H]
  float* d_weights;  // [T, K], 0 for a slot that was masked or dropped
  ExpertGradients d_experts;
};

}  // namespace flashmoe::cpu
