// The router of a PE's tokens: what flashmoe_jax/routing.py computes in `route_from`, without its
// jitter. Equal logits give equal experts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/gate_arguments.h"
#include "kernels/cuda/router_logits.h"
#include "kernels/cuda/top_k.h"
#include "kernels/device/barrier.h"
#include "kernels/device/element.h"
#include "kernels/device/identity.h"
#include "kernels/device/warp.h"

namespace flashmoe::cuda {

namespace internal {

// As in routing.py: keeps the weights finite when all chosen sigmoid scores underflow.
inline constexpr float kRenormalizeEpsilon = 1e-20f;

template <int kLanes>
FLASHMOE_DEVICE float team_sum(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    x += device::shuffle_xor(x, distance);
  }
  return x;
}

template <int kLanes>
FLASHMOE_DEVICE float team_max(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const float other = device::shuffle_xor(x, distance);
    x = other > x ? other : x;
  }
  return x;
}

// The scores of one token: of a logit l, e^(l - maximum) / sum or 1 / (1 + e^-l).
struct Scores {
  bool softmax;
  float maximum;
  float sum;

  FLASHMOE_DEVICE float exponential(float logit) const {
    return device::exp_precise(softmax ? logit - maximum : -logit);
  }
  FLASHMOE_DEVICE float of(float exponential) const {
    return (softmax ? exponential : 1.0f) / (softmax ? sum : 1.0f + exponential);
  }
};

// Turns a team's logits into their scores.
template <int kLanes, int kValues>
FLASHMOE_DEVICE Scores score(bool softmax, float (&values)[kValues]) {
  float maximum = values[0];
#pragma unroll
  for (int i = 1; i < kValues; ++i) maximum = values[i] > maximum ? values[i] : maximum;
  Scores scores{softmax, team_max<kLanes>(maximum), 0.0f};
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    values[i] = scores.exponential(values[i]);
    scores.sum += values[i];
  }
  scores.sum = team_sum<kLanes>(scores.sum);
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = scores.of(values[i]);
  return scores;
}

// Bit i: expert lane % kLanes + i * kLanes is in one of the token's best groups. A group is worth
// the sum of its two best scores. `scratch` has num_experts floats for this team.
template <int kLanes, int kValues>
FLASHMOE_DEVICE uint32_t eligible_experts(const GateArguments& arguments,
                                          const float (&scores)[kValues], float* scratch) {
  const int member = device::lane_index() % kLanes;
  const int size = arguments.num_experts / arguments.num_groups;
  float* own = scratch + member;
  device::warp_sync();
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (i * kLanes < arguments.num_experts - member) own[i * kLanes] = scores[i];
  }
  device::warp_sync();
  TopK<kLanes, kValues> groups;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int group = i * kLanes + member;
    groups.keys[i] = 0;
    if (group >= arguments.num_groups) continue;
    // Each lane starts elsewhere in its group, or they would all want the same bank.
    int at = member % size;
    float best = scratch[group * size + at];
    float second = 0.0f;
    for (int seen = 1; seen < size; ++seen) {
      at = at + 1 == size ? 0 : at + 1;
      const float score = scratch[group * size + at];
      if (score > best) {
        second = best;
        best = score;
      } else if (seen == 1 || score > second) {
        second = score;
      }
    }
    groups.keys[i] = order_key(size > 1 ? best + second : best);
  }
  uint32_t eligible = 0;
  for (int round = 0; round < arguments.groups_per_token; ++round) {
    const int first = groups.take() * size - member;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (i * kLanes >= first && i * kLanes < first + size) eligible |= 1u << i;
    }
  }
  return eligible;
}

// One token for each team of kLanes lanes. All lanes of the warp come here; those without a token
// of their own compute another's and write nothing.
template <int kLanes, int kValues>
FLASHMOE_DEVICE void choose_for_token(const GateArguments& arguments, int32_t token, bool write,
                                      float* scratch) {
  static_assert(kValues <= 32);
  constexpr int kSlots = (kMaxExpertsPerToken + kLanes - 1) / kLanes;
  const int member = device::lane_index() % kLanes;
  const int end = arguments.num_experts - member;
  const float* logits = arguments.logits + int64_t{token} * arguments.num_experts;
  const float* own = logits + member;
  float values[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    values[i] = i * kLanes < end ? own[i * kLanes] : device::float_of_bits(0xff800000u);
  }
  const Scores scores = score<kLanes>(arguments.softmax, values);
  if (arguments.selection_bias != nullptr) {
    const float* bias = arguments.selection_bias + member;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (i * kLanes < end) values[i] += bias[i * kLanes];
    }
  }
  uint32_t eligible = device::kFullMask;
  if (arguments.groups_per_token < arguments.num_groups) {
    eligible = eligible_experts<kLanes>(arguments, values, scratch);
  }
  TopK<kLanes, kValues> experts;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const float value = (eligible >> i & 1) != 0 ? values[i] : device::float_of_bits(0xff800000u);
    experts.keys[i] = i * kLanes < end ? order_key(value) : 0;
  }

  int32_t chosen[kSlots] = {};
  for (int slot = 0; slot < arguments.experts_per_token; ++slot) {
    const int32_t expert = experts.take();
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (i * kLanes + member == slot) chosen[i] = expert;
    }
  }
  float weights[kSlots];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const bool exists = i * kLanes + member < arguments.experts_per_token;
    weights[i] = exists ? scores.of(scores.exponential(logits[chosen[i]])) : 0.0f;
    sum += weights[i];
  }
  sum = team_sum<kLanes>(sum);
  const bool masked = arguments.mask != nullptr && arguments.mask[token] == 0;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int slot = i * kLanes + member;
    if (!write || slot >= arguments.experts_per_token) continue;
    const int64_t at = int64_t{token} * arguments.experts_per_token + slot;
    const float weight =
        arguments.renormalize ? weights[i] / (sum + kRenormalizeEpsilon) : weights[i];
    arguments.indices[at] = masked ? -1 : chosen[i];
    arguments.weights[at] = masked ? 0.0f : weight * arguments.scaling_factor;
  }
}

template <int kThreads, int kLanes, int kValues>
FLASHMOE_DEVICE void choose_for_tokens(const GateArguments& arguments, int32_t first_token,
                                       int32_t last_token, std::byte* shared) {
  constexpr int kTeams = device::kWarpSize / kLanes;
  const int team = device::thread_index() / kLanes;
  // The teams of a warp read their scratch 8 banks apart.
  float* scratch = reinterpret_cast<float*>(shared) + team * (kLanes * kValues + 8);
  for (int32_t token = first_token + device::warp_index() * kTeams; token < last_token;
       token += kThreads / kLanes) {
    const int32_t own = token + team % kTeams;
    choose_for_token<kLanes, kValues>(arguments, own < last_token ? own : last_token - 1,
                                      own < last_token, scratch);
  }
}

}  // namespace internal

// The experts and weights of tokens [first_token, last_token), whose logits this CTA can see. By
// all threads of the CTA, with kGateSharedBytes of shared memory; both are free again when it
// returns.
template <int kThreads>
FLASHMOE_DEVICE void choose_experts(const GateArguments& arguments, int32_t first_token,
                                    int32_t last_token, std::byte* shared) {
  if (first_token >= last_token) return;
  if (arguments.num_experts <= 128) {
    internal::choose_for_tokens<kThreads, 8, 16>(arguments, first_token, last_token, shared);
  } else if (arguments.num_experts <= 256) {
    internal::choose_for_tokens<kThreads, 8, 32>(arguments, first_token, last_token, shared);
  } else {
    internal::choose_for_tokens<kThreads, 16, 32>(arguments, first_token, last_token, shared);
  }
  device::block_sync();
}

// In shared memory it takes no registers while the router is multiplied.
struct TokenRange {
  int32_t first;
  int32_t last;  // not in it
};

// Both for a range of tokens, with at least kGateSharedBytes of shared memory. A barrier of the
// grid makes the results visible to other CTAs.
template <typename Element, int kThreads>
FLASHMOE_DEVICE void gate(const GateArguments& arguments, const TokenRange& tokens,
                          std::byte* shared, size_t shared_bytes) {
  const LogitsArguments products{arguments.x, arguments.router, arguments.logits, arguments.hidden,
                                 arguments.num_experts};
  router_logits<Element, kThreads>(products, tokens.first, tokens.last, 0, arguments.num_experts,
                                   shared, shared_bytes);
  choose_experts<kThreads>(arguments, tokens.first, tokens.last, shared);
}

}  // namespace flashmoe::cuda
