#include "kernels/cuda/driver.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "kernels/cuda/memory.h"

namespace flashmoe::cuda {

void* driver_function(const char* name, unsigned version) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult result;
  check_cuda(cudaGetDriverEntryPointByVersion(name, &address, version, cudaEnableDefault, &result),
             "finding " + std::string(name));
  if (result != cudaDriverEntryPointSuccess || address == nullptr) {
    throw std::runtime_error("the CUDA driver has no " + std::string(name));
  }
  return address;
}

}  // namespace flashmoe::cuda
