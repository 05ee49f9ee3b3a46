// The conversion of the element types that the operator stores and moves to and from float, in
// which all arithmetic is done.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "kernels/core/types.h"

namespace flashmoe::cpu {

using core::BFloat16;
using core::DType;
using core::Float16;

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

// Branch-free, so that loops over it vectorise. The product with 2^112 moves the exponent from the
// half's bias to the float's and makes subnormal halves normal; infinities and NaNs, whose exponent
// the product does not saturate, are mended last.
inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | sign);
}

template <typename S>
S from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

// Round to nearest even; a NaN stays a (quiet) NaN.
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return BFloat16{static_cast<uint16_t>(x != x ? quiet : rounded)};
}

// Round to nearest even. A value below the smallest normal half is added to a number whose last
// place is the spacing of subnormal halves, so that the addition itself rounds.
template <>
inline Float16 from_float<Float16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds to 65536 or more
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return Float16{static_cast<uint16_t>(half | sign)};
}

}  // namespace flashmoe::cpu
