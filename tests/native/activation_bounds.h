// The exact activations, and how far the float ones of kernels/cpu/activation.h may be from them.
// One table serves the test of the activations themselves and the error analysis of the layer.
#pragma once

#include <algorithm>
#include <cmath>
#include <numbers>

#include "kernels/cpu/activation.h"

namespace flashmoe::testing {

// Half the spacing of floats in [1, 2): the largest relative error of one float operation.
inline constexpr double kFloatRoundoff = 0x1p-24;
// The smallest float above 0.
inline constexpr double kSmallest = 0x1p-149;

inline long double exact_activation(cpu::Activation kind, long double x) {
  switch (kind) {
    case cpu::Activation::kSilu:
      return x / (1 + std::exp(-x));
    case cpu::Activation::kGelu:
      return x / 2 * std::erfc(-x / std::numbers::sqrt2_v<long double>);
    case cpu::Activation::kGeluTanh: {
      const long double z =
          std::sqrt(2 / std::numbers::pi_v<long double>) * (x + 0.044715L * x * x * x);
      return x / (1 + std::exp(-2 * z));
    }
    case cpu::Activation::kRelu:
      return x > 0 ? x : 0;
    case cpu::Activation::kRelu2:
      return x > 0 ? x * x : 0;
  }
  return 0;
}

// Its central difference quotient with this step, which is the slope up to step^2 / 6 times the
// third derivative, a number below 2. Relu's slope at 0 is 0.
inline constexpr double kSlopeStep = 1e-6;
inline long double exact_slope(cpu::Activation kind, long double x) {
  long double step = kSlopeStep;
  if (kind == cpu::Activation::kRelu || kind == cpu::Activation::kRelu2) {
    if (x == 0) return 0;
    step = std::min(step, std::abs(x) / 2);  // stay on this side of the bend
  }
  const long double right = x + step, left = x - step;
  return (exact_activation(kind, right) - exact_activation(kind, left)) / (right - left);
}

// Of activate(x).value. Silu: exp, 1 + exp, 1 / ..., x * ..., and below -88 the sigmoid is 0. Gelu:
// half of erf's 1.5e-7 and of its 8 roundings, and one of the product. Gelu_tanh: the argument z of
// its sigmoid s is 5 roundings off, and |z| s (1 - s) is below 0.3.
inline double activation_value_error(cpu::Activation kind, double x, double value) {
  switch (kind) {
    case cpu::Activation::kSilu:
      return 6 * kFloatRoundoff * std::abs(value) + 1e-36;
    case cpu::Activation::kGelu:
      return (0.75e-7 + 5 * kFloatRoundoff) * std::abs(x);
    case cpu::Activation::kGeluTanh:
      return 6 * kFloatRoundoff * std::abs(x);
    case cpu::Activation::kRelu:
      return 0;
    case cpu::Activation::kRelu2:
      return kFloatRoundoff * value + kSmallest;
  }
  return 0;
}

// Of activate(x).slope. Where s, the sigmoid, is near 1, 1 - s is off by one rounding of 1 until it
// is 0. Until then the factor before it (x; in gelu_tanh 2 x times the slope of the tanh's
// argument) is below 17 (36). The density of gelu is at most 0.4, and |x| times it 0.25.
inline double activation_slope_error(cpu::Activation kind) {
  switch (kind) {
    case cpu::Activation::kSilu:
      return 20 * kFloatRoundoff;
    case cpu::Activation::kGelu:
      return 0.75e-7 + 8 * kFloatRoundoff;
    case cpu::Activation::kGeluTanh:
      return 40 * kFloatRoundoff;
    case cpu::Activation::kRelu:
    case cpu::Activation::kRelu2:  // a factor of 2
      return 0;
  }
  return 0;
}

}  // namespace flashmoe::testing
