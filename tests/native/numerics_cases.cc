// Conversions between element types and activations, against exact arithmetic.
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cpu/activation.h"
#include "kernels/cpu/storage.h"
#include "tests/native/activation_bounds.h"
#include "tests/native/harness.h"

namespace flashmoe::testing {
namespace {

using cpu::Activation;
using cpu::BFloat16;
using cpu::Float16;

// A binary floating-point format of 16 bits, by its definition in IEEE 754.
template <typename S>
struct Format;
template <>
struct Format<Float16> {
  static constexpr int kMantissaBits = 10;
  static constexpr int kBias = 15;
};
template <>
struct Format<BFloat16> {
  static constexpr int kMantissaBits = 7;
  static constexpr int kBias = 127;
};

template <typename S>
constexpr uint32_t kInfinityBits = 0x7fffu & (~0u << Format<S>::kMantissaBits);

template <typename S>
double decode(uint16_t bits) {
  constexpr int kMantissa = Format<S>::kMantissaBits;
  const int exponent = (bits & 0x7fff) >> kMantissa;
  const int mantissa = bits & ((1 << kMantissa) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == kInfinityBits<S> >> kMantissa) {
    return mantissa != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - Format<S>::kBias - kMantissa);
  return sign * std::ldexp(mantissa + (1 << kMantissa), exponent - Format<S>::kBias - kMantissa);
}

std::string hex(uint32_t bits) {
  std::array<char, 16> text{};
  std::snprintf(text.data(), text.size(), "0x%x", bits);
  return text.data();
}

template <typename S>
void check_rounds_to(float x, uint32_t expected) {
  const uint16_t got = cpu::from_float<S>(x).bits;
  if (got == expected) return;
  check(false, "the float " + hex(std::bit_cast<uint32_t>(x)) + " became " + hex(got) +
                   ", expected " + hex(expected));
}

template <typename S>
void round_trip(uint64_t) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const S stored{static_cast<uint16_t>(bits)};
    const float value = cpu::to_float(stored);
    const double exact = decode<S>(stored.bits);
    if (std::isnan(exact)) {
      check(std::isnan(value), hex(bits) + " must be a NaN");
      const uint16_t back = cpu::from_float<S>(value).bits;
      check(std::isnan(decode<S>(back)), hex(bits) + " must stay a NaN, became " + hex(back));
      check((back & 0x8000u) == (bits & 0x8000u), hex(bits) + " must keep its sign");
      continue;
    }
    // Compared with the sign of zero.
    check(std::bit_cast<uint64_t>(double{value}) == std::bit_cast<uint64_t>(exact),
          hex(bits) + " became " + std::to_string(value));
    check_rounds_to<S>(value, bits);
  }
}

// Between any two neighbours: their midpoint goes to the even one, a float just beside the midpoint
// to the nearer one. Past the largest finite value the neighbour is the power of two that would
// follow, and what reaches it is infinite.
template <typename S>
void rounding(uint64_t) {
  for (uint32_t sign : {0x0000u, 0x8000u}) {
    const float direction = sign == 0 ? 1.0f : -1.0f;
    for (uint32_t bits = 0; bits < kInfinityBits<S>; ++bits) {
      const double low = decode<S>(static_cast<uint16_t>(bits));
      const double step = bits + 1 == kInfinityBits<S>
                              ? low - decode<S>(static_cast<uint16_t>(bits - 1))
                              : decode<S>(static_cast<uint16_t>(bits + 1)) - low;
      const float middle = static_cast<float>(low + step / 2);
      check(middle == low + step / 2, "midpoints are floats");
      const uint32_t even = bits % 2 == 0 ? bits : bits + 1;
      check_rounds_to<S>(direction * middle, sign | even);
      check_rounds_to<S>(direction * std::nextafter(middle, 0.0f), sign | bits);
      check_rounds_to<S>(direction * std::nextafter(middle, std::numeric_limits<float>::infinity()),
                         sign | (bits + 1));
    }
    const float most = direction * std::numeric_limits<float>::max();
    check_rounds_to<S>(most, sign | kInfinityBits<S>);
    check_rounds_to<S>(direction * std::numeric_limits<float>::infinity(), sign | kInfinityBits<S>);
    check_rounds_to<S>(direction * 0.0f, sign);
    check_rounds_to<S>(direction * std::numeric_limits<float>::denorm_min(), sign);
  }
}

std::vector<float> activation_arguments(uint64_t seed) {
  std::vector<float> points;
  for (int i = -40'000; i <= 40'000; ++i) points.push_back(static_cast<float>(i) / 2048);
  Random random(seed);
  for (int i = 0; i < 20'000; ++i) {
    // Every magnitude from 1e-30 to 1e18: far beyond what is left of the function's bends.
    const double magnitude = std::pow(10.0, -30 + 48 * random.uniform());
    points.push_back(static_cast<float>(random.chance(0.5) ? magnitude : -magnitude));
  }
  return points;
}

template <Activation kKind>
void activation_values(uint64_t seed) {
  for (float x : activation_arguments(seed)) {
    const long double exact = exact_activation(kKind, x);
    const long double error = std::abs(cpu::activate<kKind>(x).value - exact);
    const double bound = activation_value_error(kKind, x, static_cast<double>(exact));
    check(error <= bound, "at " + std::to_string(x) + " the value is off by " +
                              std::to_string(static_cast<double>(error / kFloatRoundoff)) +
                              " roundings, allowed are " + std::to_string(bound / kFloatRoundoff));
  }
  check(std::isnan(cpu::activate<kKind>(std::nanf("")).value), "a NaN must stay a NaN");
}

template <Activation kKind>
void activation_slopes(uint64_t seed) {
  for (float x : activation_arguments(seed)) {
    if (std::abs(x) > 1e6f) continue;  // steps are below the spacing of long doubles
    const long double exact = exact_slope(kKind, x);
    const long double error = std::abs(cpu::activate<kKind>(x).slope - exact);
    const long double roundings = std::abs(exact_activation(kKind, x)) * 0x1p-62L /
                                  std::min<long double>(kSlopeStep, x == 0 ? 1 : std::abs(x));
    const double quotient_error = kSlopeStep * kSlopeStep + static_cast<double>(roundings);
    const double bound = activation_slope_error(kKind) + quotient_error;
    check(error <= bound, "at " + std::to_string(x) + " the slope is off by " +
                              std::to_string(static_cast<double>(error / kFloatRoundoff)) +
                              " roundings, allowed are " + std::to_string(bound / kFloatRoundoff));
  }
}

void exponential(uint64_t seed) {
  Random random(seed);
  const float lowest = -87.33f, highest = 88.72f;
  std::vector<float> points{lowest, highest, 0.0f, -0.0f, 1.0f};
  for (int i = 0; i < 100'000; ++i) {
    points.push_back(static_cast<float>(lowest + (highest - lowest) * random.uniform()));
  }
  for (float x : points) {
    const long double exact = std::exp(static_cast<long double>(x));
    const long double error = std::abs(cpu::exp_float(x) - exact) / exact;
    check(error <= 2 * kFloatRoundoff, "exp(" + std::to_string(x) + ") is off by " +
                                           std::to_string(static_cast<double>(error)) +
                                           " of itself");
  }
  const float infinity = std::numeric_limits<float>::infinity();
  check(cpu::exp_float(-88.0f) == 0.0f && cpu::exp_float(-infinity) == 0.0f, "exp must end at 0");
  check(cpu::exp_float(88.73f) == infinity && cpu::exp_float(infinity) == infinity,
        "exp must be infinite past the largest float");
  check(std::isnan(cpu::exp_float(std::nanf(""))), "a NaN must stay a NaN");
}

template <Activation kKind>
void add_activation_cases(std::vector<Case>& cases, const std::string& name) {
  cases.push_back({"numerics: " + name + " values", activation_values<kKind>});
  cases.push_back({"numerics: " + name + " slopes", activation_slopes<kKind>});
}

}  // namespace

std::vector<Case> numerics_cases() {
  std::vector<Case> cases{
      {"numerics: bfloat16 round trip", round_trip<BFloat16>},
      {"numerics: float16 round trip", round_trip<Float16>},
      {"numerics: bfloat16 rounding", rounding<BFloat16>},
      {"numerics: float16 rounding", rounding<Float16>},
      {"numerics: exp", exponential},
  };
  add_activation_cases<Activation::kSilu>(cases, "silu");
  add_activation_cases<Activation::kGelu>(cases, "gelu");
  add_activation_cases<Activation::kGeluTanh>(cases, "gelu_tanh");
  add_activation_cases<Activation::kRelu>(cases, "relu");
  add_activation_cases<Activation::kRelu2>(cases, "relu2");
  return cases;
}

}  // namespace flashmoe::testing
