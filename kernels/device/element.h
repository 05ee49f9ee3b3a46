// Conversion between the element types and float (PTX ISA, `cvt`), and the elementary functions
// that activations are made of (`ex2.approx`, `rcp.approx`).
#pragma once

#include <bit>

#include "kernels/core/types.h"
#include "kernels/device/body.h"

#if FLASHMOE_EMULATED
#include <cmath>

#include "kernels/cpu/storage.h"
#endif

namespace flashmoe::device {

using core::BFloat16;
using core::Float16;

FLASHMOE_DEVICE float to_float(float x) { return x; }

FLASHMOE_DEVICE float to_float(BFloat16 x) {
#if FLASHMOE_EMULATED
  return cpu::to_float(x);
#else
  return __uint_as_float(uint32_t{x.bits} << 16);
#endif
}

FLASHMOE_DEVICE float to_float(Float16 x) {
#if FLASHMOE_EMULATED
  return cpu::to_float(x);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

// Round to nearest even.
template <typename T>
FLASHMOE_DEVICE T from_float(float x);

template <>
FLASHMOE_DEVICE float from_float<float>(float x) {
  return x;
}

template <>
FLASHMOE_DEVICE BFloat16 from_float<BFloat16>(float x) {
#if FLASHMOE_EMULATED
  return cpu::from_float<BFloat16>(x);
#else
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}

template <>
FLASHMOE_DEVICE Float16 from_float<Float16>(float x) {
#if FLASHMOE_EMULATED
  return cpu::from_float<Float16>(x);
#else
  Float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}

FLASHMOE_DEVICE uint32_t float_bits(float x) {
#if FLASHMOE_EMULATED
  return std::bit_cast<uint32_t>(x);
#else
  return __float_as_uint(x);
#endif
}

FLASHMOE_DEVICE float float_of_bits(uint32_t bits) {
#if FLASHMOE_EMULATED
  return std::bit_cast<float>(bits);
#else
  return __uint_as_float(bits);
#endif
}

// e^x, within two units in the last place.
FLASHMOE_DEVICE float exp_precise(float x) {
#if FLASHMOE_EMULATED
  return std::exp(x);
#else
  return expf(x);
#endif
}

// e^x, fast. Its relative error grows with |x|, whose product with log2(e) is rounded: about 2^-21
// at 1 and 2^-17 at 80. For activations; `exp_precise` is for what decides something.
FLASHMOE_DEVICE float exp_approx(float x) {
  const float exponent = x * 1.4426950408889634f;
#if FLASHMOE_EMULATED
  return std::exp2(exponent);
#else
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(exponent));
  return y;
#endif
}

// 1 / x, within one unit in the last place; 0 for infinity.
FLASHMOE_DEVICE float reciprocal_approx(float x) {
#if FLASHMOE_EMULATED
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

FLASHMOE_DEVICE float not_a_number() {
#if FLASHMOE_EMULATED
  return std::bit_cast<float>(0x7fc00000u);
#else
  return __uint_as_float(0x7fc00000u);
#endif
}

}  // namespace flashmoe::device
