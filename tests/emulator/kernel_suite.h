// The layers that every kernel must compute, in the emulator and on a GPU: shapes and routings that
// lead to the edges, on 1 to 8 PEs, as small as the emulator wants them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/core/types.h"
#include "tests/emulator/kernel_layer.h"
#include "tests/native/problem.h"

namespace flashmoe::testing {

struct SuiteCase {
  std::string name;
  Layer layer;
  Routing routing;
};

inline std::vector<SuiteCase> kernel_suite(core::DType dtype) {
  using core::Activation;
  std::vector<SuiteCase> cases;
  constexpr int kGated = 1, kBiased = 2;
  const auto layer = [&](const LayerSizes& sizes, int parts,
                         Activation activation = Activation::kSilu) {
    return kernel_layer(sizes, dtype, (parts & kGated) != 0, (parts & kBiased) != 0, activation);
  };
  const auto add = [&](const std::string& name, const Layer& of, Routing routing) {
    cases.push_back({name, of, routing});
  };
  for (const int32_t pes : {1, 2, 4, 8}) {
    const std::string on = std::to_string(pes) + (pes == 1 ? " PE, " : " PEs, ");
    add(on + "gated, with biases", layer({pes, 9, 72, 136, 2 * pes, 2}, kGated | kBiased),
        Routing::kDistinct);
    add(on + "not gated", layer({pes, 7, 136, 72, 2 * pes, 2}, kBiased, Activation::kGelu),
        Routing::kRepeating);
    add(on + "skewed", layer({pes, 11, 64, 72, 4 * pes, 3}, kGated), Routing::kSkewed);
  }
  add("several tiles of columns", layer({2, 5, 264, 264, 4, 2}, kGated | kBiased),
      Routing::kDistinct);
  add("several blocks of rows", layer({2, 150, 16, 24, 2, 1}, kGated), Routing::kAllToOne);
  // Rows of 3 and 5 pieces of 16 bytes.
  const int32_t piece = dtype == core::DType::kFloat32 ? 4 : 8;
  add("odd widths", layer({2, 9, 3 * piece, 5 * piece, 4, 2}, kGated | kBiased),
      Routing::kDistinct);
  add("one token", layer({1, 1, 8, 8, 4, 2}, kGated | kBiased, Activation::kGeluTanh),
      Routing::kDistinct);
  add("no token", layer({2, 0, 8, 8, 4, 2}, kGated | kBiased, Activation::kRelu),
      Routing::kDistinct);
  add("one expert has all", layer({4, 33, 16, 24, 8, 1}, kGated, Activation::kRelu2),
      Routing::kAllToOne);
  add("PEs without rows", layer({4, 17, 16, 24, 16, 4}, kGated, Activation::kRelu),
      Routing::kSomePesMasked);
  add("no row at all", layer({2, 9, 16, 16, 4, 2}, kGated), Routing::kAllMasked);
  add("512 experts, 16 of them for each token", layer({4, 1, 16, 8, 512, 16}, kGated),
      Routing::kDistinct);
  for (const bool capacity : {false, true}) {
    for (const bool bounded : {false, true}) {
      if (!capacity && !bounded) continue;
      Layer limited = layer({4, 30, 16, 24, 8, 2}, kGated);
      if (capacity) limited.shape.capacity = 7;
      if (bounded) limited.shape.max_rows = capacity ? 11 : 37;
      add(capacity && bounded ? "capacity and bounded memory"
          : capacity          ? "capacity"
                              : "bounded memory",
          limited, Routing::kSkewed);
    }
  }
  return cases;
}

}  // namespace flashmoe::testing
