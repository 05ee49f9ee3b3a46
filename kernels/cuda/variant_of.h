// The entry of a kernel in the table of variants, as its engine says.
#pragma once

#include <type_traits>

#include "kernels/core/types.h"
#include "kernels/cuda/kernel.h"
#include "kernels/cuda/variants.h"

namespace flashmoe::cuda {

template <typename Element>
constexpr core::DType kDTypeOf = std::is_same_v<Element, float>           ? core::DType::kFloat32
                                 : std::is_same_v<Element, core::Float16> ? core::DType::kFloat16
                                                                          : core::DType::kBFloat16;

// `kernel` as in KernelVariant.
template <typename Engine>
KernelVariant variant_of(bool network, const void* kernel) {
  return {
      .dtype = kDTypeOf<typename Engine::Element>,
      .exact = Engine::kExact,
      .block_rows = Engine::kBlockRows,
      .columns = Engine::kColumns,
      .threads = Engine::kThreads,
      .shared_bytes = sizeof(KernelShared<Engine>),
      .tensor_maps = Engine::kTensorMaps,
      .network = network,
      .kernel = kernel,
  };
}

}  // namespace flashmoe::cuda
