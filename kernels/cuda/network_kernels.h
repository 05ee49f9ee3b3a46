// The kernels with the network transport, on one GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/core/types.h"
#include "kernels/cuda/gpu.h"
#include "kernels/cuda/nvshmem.h"

namespace flashmoe::cuda {

class NetworkKernels {
 public:
  // On the current GPU, after NVSHMEM has started there. Throws std::runtime_error if this module
  // has none for it, or if CUDA or NVSHMEM refuses.
  NetworkKernels(const Gpu& gpu, const Nvshmem& nvshmem);

  // As KernelVariant::kernel.
  const void* find(core::DType dtype) const;
  // Waits until everything that launches on this GPU have put is there.
  void quiet() const;

 private:
  const void* find(const char* name) const;

  int32_t gpu_;
  cudaLibrary_t library_ = nullptr;  // stays until the process ends
};

}  // namespace flashmoe::cuda
