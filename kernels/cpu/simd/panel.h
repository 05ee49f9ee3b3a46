// Operands of a product in the form in which its tiles read them.
//
// A unit is what one multiply-add takes of a row of op(a) and of a column of op(b): a float, or two
// BFloat16 that are neighbours along k (`Pair`, the lower k in the lower half). A panel is a few
// columns of op(b) as [units along k][width].
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "kernels/cpu/simd/kernels.h"
#include "kernels/cpu/simd/vector.h"

namespace flashmoe::cpu::simd::FLASHMOE_SIMD_LEVEL {

using Pair = uint32_t;

template <typename Unit>
using UnitVector = std::conditional_t<std::is_same_v<Unit, Pair>, Words, Vector>;

// How many elements along k a unit holds.
template <typename Unit>
inline constexpr int kUnitDepth = std::is_same_v<Unit, Pair> ? 2 : 1;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// kLanes units along a row of a matrix whose rows run along k, of which the first `count` elements
// are there and the others are zeros.
template <typename Unit, typename S>
inline UnitVector<Unit> load_along_k(const S* from, int64_t count) {
  if constexpr (std::is_same_v<Unit, Pair>) {
    return count >= 2 * kLanes ? load_as<Words>(from) : load_part<Words>(from, count);
  } else {
    return load(from, count);
  }
}

// The same of a matrix whose columns run along k: elements of `row`, in a Pair side by side with
// those of `next`, the row for the next k, or with zeros where `next` is null.
template <typename Unit, typename S>
inline UnitVector<Unit> load_across_k(const S* row, const S* next, int64_t count) {
  if constexpr (std::is_same_v<Unit, Pair>) {
    const auto halves = [&](const S* from) {
      return widen(count >= kLanes ? load_as<Halves>(from) : load_part<Halves>(from, count));
    };
    return next == nullptr ? halves(row) : halves(row) | halves(next) << 16;
  } else {
    return load(row, count);
  }
}

// Lane i is lane i of a where the bit kStep of i is clear, else lane i - kStep of b. With kHigh:
// lane i + kStep of a, else lane i of b.
template <int kStep, bool kHigh, typename V, int... kLane>
inline V exchange_lanes(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int kFromA = kHigh ? kStep : 0, kFromB = kHigh ? kLanes : kLanes - kStep;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kLane + ((kLane & kStep) == 0 ? kFromA : kFromB))...);
#else
  return __builtin_shuffle(a, b, Words{(kLane + ((kLane & kStep) == 0 ? kFromA : kFromB))...});
#endif
}

template <int kStep, typename V>
inline void transpose_step(V (&rows)[kLanes]) {
  constexpr auto kSequence = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kStep) != 0) continue;
    const V low = exchange_lanes<kStep, false>(rows[i], rows[i + kStep], kSequence);
    rows[i + kStep] = exchange_lanes<kStep, true>(rows[i], rows[i + kStep], kSequence);
    rows[i] = low;
  }
}

// A square of kLanes vectors, in registers.
template <typename V>
inline void transpose(V (&rows)[kLanes]) {
  if constexpr (kLanes > 8) transpose_step<8>(rows);
  if constexpr (kLanes > 4) transpose_step<4>(rows);
  transpose_step<2>(rows);
  transpose_step<1>(rows);
}

// Panel of the first `columns` columns of a row-major op(b), filled up with zeros to a multiple of
// kLanes. `depth` counts elements along k.
template <typename Unit, typename S>
inline void pack_rows(const S* b, int64_t stride, int64_t depth, int64_t columns, Unit* panel,
                      int64_t width) {
  for (int64_t p = 0; p < depth; p += kUnitDepth<Unit>, panel += width) {
    const S* row = b + p * stride;
    const bool has_next = p + 1 < depth;
    for (int64_t j = 0; j < columns; j += kLanes) {
      store_as(load_across_k<Unit>(row + j, has_next ? row + stride + j : nullptr, columns - j),
               panel + j);
    }
  }
}

// Transposes [rows, depth], row-major and running along k, to [units along k][rows], both filled up
// with zeros to a multiple of kLanes.
template <typename Unit, typename S>
inline void pack_columns(const S* b, int64_t stride, int64_t depth, int64_t rows, Unit* panel,
                         int64_t width) {
  constexpr int kDepth = kLanes * kUnitDepth<Unit>;
  for (int64_t j = 0; j < rows; j += kLanes) {
    for (int64_t p = 0; p < depth; p += kDepth) {
      const S* from = b + j * stride + p;
      UnitVector<Unit> square[kLanes];
      if (rows - j >= kLanes && depth - p >= kDepth) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          __builtin_prefetch(from + (i + kLanes) * stride, 0, 2);  // of the squares below
          square[i] = load_along_k<Unit>(from + i * stride, kDepth);
        }
      } else {
        for (int i = 0; i < kLanes; ++i) {
          square[i] =
              j + i < rows ? load_along_k<Unit>(from + i * stride, depth - p) : UnitVector<Unit>{};
        }
      }
      transpose(square);
      Unit* to = panel + p / kUnitDepth<Unit> * width + j;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store_as(square[i], to + i * width);
    }
  }
}

}  // namespace flashmoe::cpu::simd::FLASHMOE_SIMD_LEVEL
