// The kernel as CUDA launches it, for one engine, and its entry in the table of variants.
#pragma once

#include "kernels/cuda/kernel.h"
#include "kernels/cuda/variant_of.h"

namespace flashmoe::cuda {

template <typename Engine>
__global__ void __launch_bounds__(Engine::kThreads, 1)
    moe_kernel(const __grid_constant__ KernelArguments arguments) {
  run_kernel<Engine, DirectTransport>(arguments);
}

template <typename Engine>
KernelVariant direct_variant() {
  return variant_of<Engine>(false, reinterpret_cast<const void*>(&moe_kernel<Engine>));
}

template <typename Engine>
KernelVariant network_variant() {
  return variant_of<Engine>(true, nullptr);
}

}  // namespace flashmoe::cuda
