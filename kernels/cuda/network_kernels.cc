#include "kernels/cuda/network_kernels.h"

#include <span>
#include <stdexcept>
#include <string>

#include "kernels/cuda/memory.h"
#include "kernels/cuda/network_image.h"

namespace flashmoe::cuda {

NetworkKernels::NetworkKernels(const Gpu& gpu, const Nvshmem& nvshmem) : gpu_(gpu.ordinal) {
  const std::span<const std::byte> image =
      gpu.major == 9 ? network_image_sm90() : network_image_sm80();
  if (image.empty()) {
    throw std::runtime_error(
        "some GPUs of this expert group reach each other over a network only, and this package was "
        "built without the kernels for that: NVSHMEM's headers and device library were not found "
        "then. FLASHMOE_CUDA=1 in the environment of pip takes them from PyPI. Or use "
        "implementation=\"xla\"");
  }
  check_cuda(cudaLibraryLoadData(&library_, image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
             "loading the kernels with the network transport");
  nvshmem.initialize(library_);
}

const void* NetworkKernels::find(const char* name) const {
  cudaKernel_t kernel = nullptr;
  check_cuda(cudaLibraryGetKernel(&kernel, library_, name),
             "finding the kernel " + std::string(name));
  return kernel;
}

const void* NetworkKernels::find(core::DType dtype) const {
  switch (dtype) {
    case core::DType::kFloat32:
      return find("network_float32");
    case core::DType::kBFloat16:
      return find("network_bfloat16");
    case core::DType::kFloat16:
      return find("network_float16");
  }
  throw std::invalid_argument("an element type without kernels");
}

void NetworkKernels::quiet() const {
  const DeviceGuard guard(gpu_);
  check_cuda(cudaLaunchKernel(find("network_quiet"), dim3(1), dim3(1), nullptr, 0, nullptr),
             "launching network_quiet");
  check_cuda(cudaDeviceSynchronize(), "waiting for what was put");
}

}  // namespace flashmoe::cuda
