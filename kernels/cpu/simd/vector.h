// Vectors of floats, as wide as the instruction set that this file is compiled for has them. Mostly
// the vector extensions of GCC and Clang; intrinsics only where those have no words for it.
//
// What is compiled once per instruction set lives in the namespace FLASHMOE_SIMD_LEVEL, a macro
// that the build defines. Two copies of a function must never have the same name, or the linker
// would keep one of them for all, perhaps one that this CPU cannot run. For the same reason such
// files include nothing with inline functions but what they inline completely.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cpu/storage.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace flashmoe::cpu::simd::FLASHMOE_SIMD_LEVEL {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
inline constexpr int kRegisters = 32;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
inline constexpr int kRegisters = 16;
#elif defined(__aarch64__)
inline constexpr int kLanes = 4;
inline constexpr int kRegisters = 32;
#else
inline constexpr int kLanes = 4;
inline constexpr int kRegisters = 16;
#endif

using Vector [[gnu::vector_size(kLanes * 4)]] = float;
using Words [[gnu::vector_size(kLanes * 4)]] = uint32_t;
using Halves [[gnu::vector_size(kLanes * 2)]] = uint16_t;

template <typename To, typename From>
inline To reinterpret(From from) {
  return __builtin_bit_cast(To, from);
}

// Vectors from and to memory of any alignment.
template <typename V>
inline V load_as(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}
template <typename V>
inline void store_as(V v, void* to) {
  std::memcpy(to, &v, sizeof(V));
}
// The first `count` elements and zeros; no other memory is touched. This and the other functions
// for ragged ends are not inlined: they are rare and would be most of the code.
template <typename V, typename T>
[[gnu::noinline]] V load_part(const T* from, int64_t count) {
  V v{};
  std::memcpy(&v, from, static_cast<size_t>(count) * sizeof(T));
  return v;
}

// What the compilers have no good words for. The masks are there because GCC 12 warns, falsely, of
// the AVX-512 intrinsics without.
#if defined(__AVX512F__)
inline Words widen(Halves h) {
  return reinterpret<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret<__m256i>(h)));
}
inline Halves narrow(Words w) {
  return reinterpret<Halves>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret<__m512i>(w)));
}
inline Vector load(const Float16* from) {
  return _mm512_maskz_cvtph_ps(0xffff, load_as<__m256i>(from));
}
inline void store(Vector v, Float16* to) {
  store_as(_mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), to);
}
#elif defined(__AVX2__)
inline Words widen(Halves h) {
  return reinterpret<Words>(_mm256_cvtepu16_epi32(reinterpret<__m128i>(h)));
}
inline Halves narrow(Words w) { return __builtin_convertvector(w, Halves); }
inline Vector load(const Float16* from) { return _mm256_cvtph_ps(load_as<__m128i>(from)); }
inline void store(Vector v, Float16* to) {
  store_as(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), to);
}
#else
inline Words widen(Halves h) { return __builtin_convertvector(h, Words); }
inline Halves narrow(Words w) { return __builtin_convertvector(w, Halves); }
inline Vector load(const Float16* from) {
  Vector v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(from[i]);
  return v;
}
inline void store(Vector v, Float16* to) {
  for (int i = 0; i < kLanes; ++i) to[i] = from_float<Float16>(v[i]);
}
#endif

inline Vector load(const float* from) { return load_as<Vector>(from); }
inline void store(Vector v, float* to) { store_as(v, to); }

inline Vector load(const BFloat16* from) {
  return reinterpret<Vector>(widen(load_as<Halves>(from)) << 16);
}
#if defined(__AVX512BF16__)
// One instruction, which takes subnormal numbers for zeros. Only products are compiled with it; the
// loops round as from_float does.
inline void store(Vector v, BFloat16* to) { store_as(_mm512_cvtneps_pbh(v), to); }
#else
inline void store(Vector v, BFloat16* to) {
  const Words bits = reinterpret<Words>(v);
  const Words high = bits >> 16;
  const Words rounded = (bits + 0x7fffu + (high & 1u)) >> 16;
  store_as(narrow(v != v ? high | 0x40u : rounded), to);
}
#endif

template <typename S>
[[gnu::noinline]] Vector load_ragged(const S* from, int64_t count) {
  S part[kLanes] = {};
  std::memcpy(part, from, static_cast<size_t>(count) * sizeof(S));
  return load(part);
}
template <typename S>
[[gnu::noinline]] void store_ragged(Vector v, S* to, int64_t count) {
  S part[kLanes];
  store(v, part);
  std::memcpy(to, part, static_cast<size_t>(count) * sizeof(S));
}

// The first `count` of kLanes elements, or all if there are more; the others are zeros and are not
// touched in memory.
template <typename S>
inline Vector load(const S* from, int64_t count) {
  return count >= kLanes ? load(from) : load_ragged(from, count);
}
template <typename S>
inline void store(Vector v, S* to, int64_t count) {
  count >= kLanes ? store(v, to) : store_ragged(v, to, count);
}

}  // namespace flashmoe::cpu::simd::FLASHMOE_SIMD_LEVEL
