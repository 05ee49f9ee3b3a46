// The sizes at which the gate is tested: small ones, which lead it to its edges in the emulator and
// on a GPU alike.
#pragma once

#include <string>

#include "kernels/core/types.h"
#include "tests/emulator/gate_reference.h"

namespace flashmoe::testing {

// For tokens of this type and CTAs of this many threads.
template <typename Element_, int kThreads_>
struct GateTest {
  using Element = Element_;
  static constexpr int kThreads = kThreads_;

  std::string name;
  GateSizes sizes;
};

// Calls f(test) for each.
template <typename F>
void for_each_gate_test(const F& f) {
  using core::BFloat16;
  using core::Float16;
  f(GateTest<BFloat16, 512>{"softmax",
                            {.tokens = 45, .hidden = 72, .experts = 128, .experts_per_token = 8}});
  f(GateTest<BFloat16, 384>{"sigmoid with groups, bias and mask",
                            {.tokens = 19,
                             .hidden = 40,
                             .experts = 256,
                             .experts_per_token = 8,
                             .groups = 8,
                             .groups_per_token = 4,
                             .softmax = false,
                             .bias = true,
                             .mask = true,
                             .scaling_factor = 2.5f}});
  f(GateTest<BFloat16, 512>{"512 experts, more stages than fit",
                            {.tokens = 33,
                             .hidden = 136,
                             .experts = 512,
                             .experts_per_token = 16,
                             .groups = 16,
                             .groups_per_token = 3,
                             .renormalize = false}});
  f(GateTest<BFloat16, 384>{
      "512 experts, 12 warps, several passes",
      {.tokens = 35, .hidden = 40, .experts = 512, .experts_per_token = 2, .bias = true}});
  f(GateTest<Float16, 384>{"unaligned router, all experts",
                           {.tokens = 7,
                            .hidden = 72,
                            .experts = 6,
                            .experts_per_token = 6,
                            .softmax = false,
                            .bias = true}});
  f(GateTest<Float16, 384>{"groups of one expert",
                           {.tokens = 5,
                            .hidden = 8,
                            .experts = 60,
                            .experts_per_token = 4,
                            .groups = 60,
                            .groups_per_token = 30,
                            .bias = true,
                            .scaling_factor = 0.5f}});
  f(GateTest<float, 512>{"float tokens",
                         {.tokens = 34,
                          .hidden = 44,
                          .experts = 132,
                          .experts_per_token = 8,
                          .renormalize = false,
                          .bias = true}});
  f(GateTest<float, 384>{"one float token",
                         {.tokens = 1,
                          .hidden = 4,
                          .experts = 33,
                          .experts_per_token = 3,
                          .softmax = false,
                          .mask = true}});
  f(GateTest<BFloat16, 384>{"no token",
                            {.tokens = 0, .hidden = 8, .experts = 8, .experts_per_token = 2}});
}

}  // namespace flashmoe::testing
