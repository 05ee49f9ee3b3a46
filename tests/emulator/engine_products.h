// Products that lead a tile engine to its edges, the kernel that runs them on one CTA, and what
// must come out. The emulator's tests and those on a GPU share them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/cpu/storage.h"
#include "kernels/cuda/product.h"
#include "kernels/device/barrier.h"
#include "kernels/device/identity.h"
#include "kernels/device/registers.h"
#include "tests/native/harness.h"

namespace flashmoe::testing {

// Results are [count][kBlockRows][kColumns].
template <typename Engine>
FLASHMOE_DEVICE void run_products(const cuda::Product* products, int count, float* results) {
  constexpr int kFirstProducer = Engine::kCommWarps;
  constexpr int kFirstMath = kFirstProducer + Engine::kProducerWarps;
  constexpr bool kMovesRegisters = kFirstMath == 4 && Engine::kMathWarps == 8;
  auto& shared = *reinterpret_cast<typename Engine::Shared*>(device::shared_memory());
  if (device::thread_index() == 0) Engine::init(shared);
  device::block_sync();
  const int warp = device::warp_index();
  if (warp < kFirstMath) {
    if constexpr (kMovesRegisters) device::keep_registers<40>();
    if (warp < kFirstProducer) return;
    typename Engine::Producer producer{};
    for (int i = 0; i < count; ++i) producer.load(shared, products[i]);
    return;
  }
  if constexpr (kMovesRegisters) device::take_registers<232>();
  typename Engine::Consumer consumer{};
  const int lane = device::lane_index();
  for (int i = 0; i < count; ++i) {
    typename Engine::Accumulators sums;
    consumer.multiply(shared, products[i].depth, sums);
    float* result = results + int64_t{i} * Engine::kBlockRows * Engine::kColumns;
#pragma unroll
    for (int m = 0; m < Engine::kRowFragments; ++m) {
#pragma unroll
      for (int c = 0; c < Engine::kWarpChunks; ++c) {
#pragma unroll
        for (int n = 0; n < Engine::kChunkFragments; ++n) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int math_warp = warp - kFirstMath;
            const int row = Engine::first_row(math_warp, m) + lane / 4 + 8 * (j / 2);
            const int column = Engine::chunk(math_warp, c) * cuda::kChunkColumns +
                               Engine::first_column(math_warp, c) + 8 * n + 2 * (lane % 4) + j % 2;
            result[row * Engine::kColumns + column] = sums[m][c][n][j];
          }
        }
      }
    }
  }
}

// The operands of products on the host. Random, from -1 to 2: sums grow with the depth, and so do
// errors of one sign.
template <typename Element>
struct Operands {
  int rows;     // R
  int experts;  // El
  int depth;
  int width;
  std::vector<Element> row_values;   // [R][depth]
  std::vector<Element> even_values;  // [El][depth][width]
  std::vector<Element> odd_values;

  Operands(Random& random, int rows, int experts, int depth, int width)
      : rows(rows), experts(experts), depth(depth), width(width) {
    row_values = fill(random, size_t(rows) * size_t(depth));
    even_values = fill(random, size_t(experts) * size_t(depth) * size_t(width));
    odd_values = fill(random, even_values.size());
  }

 private:
  static std::vector<Element> fill(Random& random, size_t count) {
    std::vector<Element> values(count);
    for (Element& x : values) {
      x = cpu::from_float<Element>(static_cast<float>(3 * random.uniform() - 1));
    }
    return values;
  }
};

// Products of those operands without their addresses: whole blocks and short ones, gated and not,
// at the first column, in the middle, and with chunks that end or begin beyond the width.
template <typename Engine>
std::vector<cuda::Product> edge_products(const Operands<typename Engine::Element>& operands) {
  constexpr int kBlockRows = Engine::kBlockRows;
  std::vector<cuda::Product> products;
  for (const bool gated : {false, true}) {
    for (const int column : {0, operands.width / 2 / 64 * 64, (operands.width - 1) / 64 * 64}) {
      for (const int row_count : {kBlockRows, 1, 37}) {
        const int index = static_cast<int>(products.size());
        cuda::Product product{};
        product.row = index % (operands.rows / kBlockRows) * kBlockRows;
        product.row_count = row_count;
        product.expert = index % operands.experts;
        product.depth = operands.depth;
        product.width = operands.width;
        product.column = column;
        product.gated = gated;
        products.push_back(product);
      }
    }
  }
  return products;
}

// The largest error of the rows that exist, relative to the sum of the magnitudes of the terms, in
// units of 2^-24. A column beyond the width must be exactly 0.
template <typename Engine>
double largest_error(const Operands<typename Engine::Element>& operands,
                     const cuda::Product& product, const float* result) {
  using Element = typename Engine::Element;
  double largest = 0;
  for (int row = 0; row < product.row_count; ++row) {
    for (int chunk = 0; chunk < Engine::kChunks; ++chunk) {
      const int first = product.column + (product.gated ? chunk / 2 : chunk) * cuda::kChunkColumns;
      const int columns = std::clamp(product.width - first, 0, cuda::kChunkColumns);
      const Element* weights = product.gated && chunk % 2 == 1 ? operands.odd_values.data()
                                                               : operands.even_values.data();
      double sums[cuda::kChunkColumns] = {};
      double magnitudes[cuda::kChunkColumns] = {};
      for (int k = 0; k < product.depth; ++k) {
        const double a = cpu::to_float(
            operands.row_values[size_t(product.row + row) * size_t(product.depth) + size_t(k)]);
        const size_t line = size_t(product.expert) * size_t(product.depth) + size_t(k);
        const Element* b = weights + line * size_t(product.width) + first;
        for (int j = 0; j < columns; ++j) {
          const double term = a * cpu::to_float(b[j]);
          sums[j] += term;
          magnitudes[j] += std::abs(term);
        }
      }
      const float* got = result + row * Engine::kColumns + chunk * cuda::kChunkColumns;
      for (int j = 0; j < cuda::kChunkColumns; ++j) {
        const double error = std::abs(got[j] - sums[j]);
        if (!(error <= magnitudes[j])) return INFINITY;  // also for a NaN
        if (error > 0) largest = std::max(largest, error / magnitudes[j] * 0x1p24);
      }
    }
  }
  return largest;
}

// The error that sums of products may have, in the same units: that of float sums that round, and
// of 16-bit elements that of tensor cores, which cut what does not fit.
template <typename Element>
double allowed_error(int depth) {
  return 4 + 2 * std::sqrt(depth) + (std::is_same_v<Element, float> ? 0 : depth / 4);
}

// The same where both factors of a product are floats, rounded to the 11 bits of a tf32, which
// changes each by at most u = 2^-11 of itself and a term by at most 2 u + u^2 = 2^-10 + 2^-22.
inline double allowed_tf32_error(int depth) {
  constexpr double kChange = 0x1p-10 + 0x1p-22;
  return 0x1p24 * kChange + (1 + kChange) * allowed_error<float>(depth);
}

}  // namespace flashmoe::testing
