// Activations and their derivatives, in float, written so that loops over them vectorise. Always
// inlined: files compiled for different instruction sets must not share a copy.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "kernels/core/types.h"

namespace flashmoe::cpu {

using core::Activation;
using core::kActivations;

struct ValueAndSlope {
  float value;
  float slope;
};

// e^x to one unit in the last place between -87.33 and 88.72 (the normal range), +0 below it and
// infinity above it: x = n ln 2 + r with |r| <= ln 2 / 2, then the Taylor polynomial of degree 7
// (remainder 5e-9).
[[gnu::always_inline]] inline float exp_float(float x) {
  constexpr float kLowest = -87.33f, kHighest = 88.72f;
  const float clamped = std::min(std::max(kLowest, x), kHighest);  // a NaN becomes kLowest
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer in the low bits
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // In two halves: 2^n alone overflows for n = 128.
  const int32_t exponent = static_cast<int32_t>(n);
  const int32_t half = exponent / 2;
  const float low = std::bit_cast<float>((half + 127) << 23);
  const float high = std::bit_cast<float>((exponent - half + 127) << 23);
  const float y = p * low * high;
  return x != x ? x : (x < kLowest ? 0.0f : (x > kHighest ? 1.0f / 0.0f : y));
}

[[gnu::always_inline]] inline float sigmoid(float x) { return 1.0f / (1.0f + exp_float(-x)); }

// erf with an absolute error of 1.5e-7 (Abramowitz and Stegun 7.1.26).
[[gnu::always_inline]] inline float erf_float(float x) {
  const float a = x < 0 ? -x : x;
  const float t = 1.0f / (1.0f + 0.3275911f * a);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float y = 1.0f - p * t * exp_float(-a * a);
  return x < 0 ? -y : y;
}

template <Activation kKind>
[[gnu::always_inline]] inline ValueAndSlope activate(float x) {
  if constexpr (kKind == Activation::kSilu) {
    const float s = sigmoid(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
  } else if constexpr (kKind == Activation::kGelu) {
    const float cdf = 0.5f * (1.0f + erf_float(x * 0.707106781f));
    const float density = 0.398942280f * exp_float(-0.5f * x * x);
    return {x * cdf, cdf + x * density};
  } else if constexpr (kKind == Activation::kGeluTanh) {
    constexpr float kScale = 0.797884561f;  // sqrt(2 / pi)
    const float inner = kScale * (x + 0.044715f * x * x * x);
    // 0.5 (1 + tanh(z)) = sigmoid(2 z)
    const float s = sigmoid(2.0f * inner);
    const float inner_slope = kScale * (1.0f + 3 * 0.044715f * x * x);
    return {x * s, s + x * 2.0f * s * (1.0f - s) * inner_slope};
  } else if constexpr (kKind == Activation::kRelu) {
    const float positive = x > 0 ? 1.0f : 0.0f;
    return {x < 0 ? 0.0f : x, positive};
  } else {
    const float positive = x > 0 ? x : 0.0f;
    return {x != x ? x : positive * positive, 2.0f * positive};
  }
}

}  // namespace flashmoe::cpu
