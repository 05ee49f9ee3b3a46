#include "kernels/cuda/gpu.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "kernels/cuda/memory.h"

namespace flashmoe::cuda {
namespace {

const KernelVariant& choose_variant(const CallSizes& sizes, const Gpu& gpu) {
  const KernelVariant* variant = nullptr;
  if (gpu.major == 9 && gpu.minor == 0) variant = find_variant(sm90_variants(), sizes);
  if (variant == nullptr && gpu.major >= 8) variant = find_variant(sm80_variants(), sizes);
  if (variant == nullptr) {
    throw std::invalid_argument("GPU " + std::to_string(gpu.ordinal) + " has compute capability " +
                                std::to_string(gpu.major) + "." + std::to_string(gpu.minor) +
                                ", for which this package has no kernel of that element type; "
                                "the least is 8.0");
  }
  return *variant;
}

}  // namespace

Gpu gpu_properties(int32_t ordinal) {
  Gpu gpu{.ordinal = ordinal, .major = 0, .minor = 0, .multiprocessors = 0};
  const auto get = [&](cudaDeviceAttr attribute, int32_t* value) {
    check_cuda(cudaDeviceGetAttribute(value, attribute, ordinal), "cudaDeviceGetAttribute");
  };
  get(cudaDevAttrComputeCapabilityMajor, &gpu.major);
  get(cudaDevAttrComputeCapabilityMinor, &gpu.minor);
  get(cudaDevAttrMultiProcessorCount, &gpu.multiprocessors);
  return gpu;
}

Configuration configure(const CallSizes& sizes, const Gpu& gpu, int32_t pes_per_gpu) {
  const KernelVariant& variant = choose_variant(sizes, gpu);
  const int32_t ctas = gpu.multiprocessors / pes_per_gpu;
  if (ctas < 1) {
    throw std::invalid_argument("GPU " + std::to_string(gpu.ordinal) +
                                " has fewer multiprocessors than PEs");
  }
  return configure(sizes, variant, ctas);
}

void load(const KernelVariant& variant, const Gpu& gpu) {
  const DeviceGuard guard(gpu.ordinal);
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, variant.kernel), "loading the kernel");
  check_cuda(cudaFuncSetAttribute(variant.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(variant.shared_bytes)),
             "shared memory of the kernel");
  int ctas = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, variant.kernel, variant.threads,
                                                           variant.shared_bytes),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  if (ctas < 1) {
    throw std::runtime_error("a CTA of the kernel does not fit on a multiprocessor of GPU " +
                             std::to_string(gpu.ordinal));
  }
}

}  // namespace flashmoe::cuda
