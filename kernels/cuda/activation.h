// The activations of an expert, in float. Which one is known at run time and equal in all threads:
// a branch that all take costs less than five times as many kernels (MathRole::activate_all).
#pragma once

#include "kernels/core/types.h"
#include "kernels/device/element.h"

namespace flashmoe::cuda {

FLASHMOE_DEVICE float sigmoid(float x) {
  return device::reciprocal_approx(1.0f + device::exp_approx(-x));
}

// erf with an absolute error of 1.5e-7 (Abramowitz and Stegun 7.1.26).
FLASHMOE_DEVICE float erf_approx(float x) {
  const float a = x < 0 ? -x : x;
  const float t = device::reciprocal_approx(1.0f + 0.3275911f * a);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float y = 1.0f - p * t * device::exp_approx(-a * a);
  return x < 0 ? -y : y;
}

FLASHMOE_DEVICE float activate(core::Activation activation, float x) {
  switch (activation) {
    case core::Activation::kSilu:
      return x * sigmoid(x);
    case core::Activation::kGelu:
      return 0.5f * x * (1.0f + erf_approx(x * 0.707106781f));
    case core::Activation::kGeluTanh:
      // 0.5 (1 + tanh(z)) = sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3).
      return x * sigmoid(2 * 0.797884561f * (x + 0.044715f * x * x * x));
    case core::Activation::kRelu:
      return x < 0 ? 0.0f : x;
    case core::Activation::kRelu2:
      return x != x ? x : (x > 0 ? x * x : 0.0f);
  }
  return device::not_a_number();
}

}  // namespace flashmoe::cuda
