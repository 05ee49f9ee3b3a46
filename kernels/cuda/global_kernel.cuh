// The kernel as CUDA launches it, for one engine, and its entry in the table of variants.
#pragma once

#include "kernels/cuda/kernel.h"
#include "kernels/cuda/variants.h"

namespace flashmoe::cuda {

template <typename Engine>
__global__ void __launch_bounds__(Engine::kThreads, 1)
    moe_kernel(const __grid_constant__ KernelArguments arguments) {
  run_kernel<Engine, DirectTransport>(arguments);
}

// Without a kernel: the one with the network transport.
template <typename Engine>
KernelVariant network_variant(core::DType dtype, bool exact, bool tensor_maps) {
  return KernelVariant{
      .dtype = dtype,
      .exact = exact,
      .block_rows = Engine::kBlockRows,
      .columns = Engine::kColumns,
      .threads = Engine::kThreads,
      .shared_bytes = sizeof(KernelShared<Engine>),
      .tensor_maps = tensor_maps,
      .network = true,
      .kernel = nullptr,
  };
}

template <typename Engine>
KernelVariant variant(core::DType dtype, bool exact, bool tensor_maps) {
  KernelVariant variant = network_variant<Engine>(dtype, exact, tensor_maps);
  variant.network = false;
  variant.kernel = reinterpret_cast<const void*>(&moe_kernel<Engine>);
  return variant;
}

}  // namespace flashmoe::cuda
