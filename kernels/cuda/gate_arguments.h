// What the gate of one PE is given. Apart from gate.h for host code.
#pragma once

#include <cstdint>

namespace flashmoe::cuda {

inline constexpr int kMaxGateExperts = 512;
inline constexpr int kMaxExpertsPerToken = 16;

struct GateArguments {
  const void* x;                // [tokens][hidden] elements; hidden is a multiple of 16 bytes
  const float* router;          // [hidden][num_experts]
  const float* selection_bias;  // [num_experts], or null
  const uint8_t* mask;          // [tokens], 0: the token is routed nowhere; or null
  float* logits;                // [tokens][num_experts]
  int32_t* indices;             // [tokens][experts_per_token], -1 where masked
  float* weights;               // [tokens][experts_per_token], 0 where masked
  int32_t tokens;
  int32_t hidden;
  int32_t num_experts;        // at most kMaxGateExperts
  int32_t experts_per_token;  // at most kMaxExpertsPerToken
  int32_t num_groups;         // divides num_experts
  int32_t groups_per_token;
  bool softmax;  // else sigmoid
  bool renormalize;
  float scaling_factor;
};

}  // namespace flashmoe::cuda
