// The tile engines on the emulator, and wrong ones that it must report.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/cuda/engine_sm80.h"
#include "kernels/cuda/engine_sm90.h"
#include "kernels/device/tensor_map.h"
#include "kernels/emulator/emulator.h"
#include "tests/emulator/engine_products.h"

namespace flashmoe::testing {

// An engine that runs the products of `operands` on one emulated CTA.
template <typename Engine>
std::vector<float> results_of(const Operands<typename Engine::Element>& operands,
                              std::vector<cuda::Product>& products, uint64_t seed) {
  using Element = typename Engine::Element;
  constexpr auto kConstant = emulator::GlobalMemory::Use::kConstant;
  const auto rows = emulator::global_memory("rows", operands.row_values, kConstant);
  const auto even = emulator::global_memory("even", operands.even_values, kConstant);
  const auto odd = emulator::global_memory("odd", operands.odd_values, kConstant);
  const auto map_of = [](const emulator::GlobalMemory& memory, uint64_t x, uint64_t y, uint64_t z,
                         const uint32_t (&box)[3]) {
    return device::TensorMap::from(
        emulator::TensorMap{memory.data(),
                            sizeof(Element),
                            {x, y, z},
                            {x * sizeof(Element), x * y * sizeof(Element)},
                            {box[0], box[1], box[2]}});
  };
  device::TensorMap maps[3] = {};
  if constexpr (requires { Engine::kRowsBox; }) {
    const auto depth = uint64_t(operands.depth);
    const auto width = uint64_t(operands.width);
    const auto experts = uint64_t(operands.experts);
    maps[0] = map_of(rows, depth, uint64_t(operands.rows), 1, Engine::kRowsBox.size);
    maps[1] = map_of(even, width, depth, experts, Engine::kWeightsBox.size);
    maps[2] = map_of(odd, width, depth, experts, Engine::kWeightsBox.size);
  }
  for (cuda::Product& product : products) {
    product.rows = {rows.data(), &maps[0]};
    product.even = {even.data(), &maps[1]};
    product.odd = product.gated ? cuda::Operand{odd.data(), &maps[2]} : product.even;
  }
  const auto arguments = emulator::global_memory("products", products, kConstant);
  const size_t count = products.size() * size_t(Engine::kBlockRows) * size_t(Engine::kColumns);
  emulator::GlobalMemory results(count * sizeof(float), "results");
  emulator::launch(
      {.threads = Engine::kThreads, .shared_bytes = sizeof(typename Engine::Shared), .seed = seed},
      [&] {
        run_products<Engine>(arguments.as<cuda::Product>(), static_cast<int>(products.size()),
                             results.as<float>());
      });
  const auto values = results.values<float>();
  return {values.begin(), values.end()};
}

// The largest error of the edge products, relative to what is allowed at their depth.
template <typename Engine>
double engine_error(uint64_t seed,
                    double (*allowed)(int depth) = allowed_error<typename Engine::Element>) {
  using Element = typename Engine::Element;
  constexpr int kPiece = 16 / sizeof(Element);
  constexpr int kDeep = 2048;
  double largest = 0;
  Random random(seed);
  for (const auto& [depth, width] : std::vector<std::pair<int, int>>{
           {25 * kPiece, 41 * kPiece}, {kPiece, kPiece}, {kDeep, kPiece}}) {
    const Operands<Element> operands(random, 2 * Engine::kBlockRows, 2, depth, width);
    std::vector<cuda::Product> products = edge_products<Engine>(operands);
    if (depth == kDeep) products.resize(1);  // the others differ in their edges only
    const std::vector<float> results = results_of<Engine>(operands, products, seed);
    for (size_t i = 0; i < products.size(); ++i) {
      const float* result = &results[i * size_t(Engine::kBlockRows) * size_t(Engine::kColumns)];
      largest =
          std::max(largest, largest_error<Engine>(operands, products[i], result) / allowed(depth));
    }
  }
  return largest;
}

// Gives a stage back while the products that read it are still running.
struct ReleasesEarly : cuda::Sm90Engine<core::BFloat16, 128> {
  struct Consumer {
    cuda::PipelinePosition<kStages> position;

    void multiply(Shared& shared, int depth, Accumulators& accumulators) {
      auto& sums = reinterpret_cast<float (&)[kColumns / 2]>(accumulators);
      for (int begin = 0; begin < depth; begin += kStageDepth) {
        Stage& stage = shared.stages[position.stage()];
        device::mbarrier_wait(&shared.full[position.stage()], position.full_parity());
        device::wgmma_fence();
        device::wgmma<core::BFloat16, kColumns>(
            sums, device::k_major_descriptor(stage.rows),
            device::mn_major_descriptor(stage.weights, sizeof(stage.weights[0])), begin > 0);
        device::wgmma_commit();
        if (device::lane_index() == 0) device::mbarrier_arrive(&shared.empty[position.stage()]);
        position.advance();
      }
      device::wgmma_finish(sums);
    }
  };
};

// Reads a stage without waiting until it is full.
struct ReadsEarly : cuda::Sm80Engine<core::BFloat16, 64> {
  struct Consumer {
    void multiply(Shared& shared, int, Accumulators& accumulators) {
      uint32_t a[4];
      device::load_matrices<false>(a, shared.stages[0].row_piece(device::lane_index(), 0));
      for (auto& row : accumulators) {
        for (auto& chunk : row) {
          for (auto& fragment : chunk) {
            for (float& x : fragment) x = static_cast<float>(a[0]);
          }
        }
      }
    }
  };
};

}  // namespace flashmoe::testing
