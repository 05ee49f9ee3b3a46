#include "kernels/cuda/gpu.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "kernels/cuda/memory.h"

namespace flashmoe::cuda {
namespace {

const KernelVariant& choose_variant(const CallSizes& sizes, const Gpu& gpu) {
  const KernelVariant* variant = nullptr;
  const bool hopper = gpu.major == 9 && gpu.minor == 0;
  if (hopper) variant = find_variant(sm90_variants(), sizes);
  // Each architecture has its own image of kernels with the network transport.
  const bool may_be_sm80 = sizes.network ? gpu.major == 8 : gpu.major >= 8;
  if (variant == nullptr && may_be_sm80) {
    const bool is_float = sizes.dtype == core::DType::kFloat32;
    variant = find_variant(is_float ? sm80_float_variants() : sm80_variants(), sizes);
  }
  if (variant == nullptr && sizes.network) {
    throw std::invalid_argument(
        "some GPUs of this expert group reach each other over a network only, and for that this "
        "package has kernels of bfloat16 and float16 for compute capabilities 8.x and 9.0, and of "
        "float32 (with jax_default_matmul_precision=\"highest\" or \"float32\") for 8.x; GPU " +
        std::to_string(gpu.ordinal) + " has " + std::to_string(gpu.major) + "." +
        std::to_string(gpu.minor) + ". Use implementation=\"xla\"");
  }
  if (variant == nullptr) {
    throw std::invalid_argument("GPU " + std::to_string(gpu.ordinal) + " has compute capability " +
                                std::to_string(gpu.major) + "." + std::to_string(gpu.minor) +
                                ", for which this package has no kernel of that element type; "
                                "the least is 8.0");
  }
  const auto shared_bytes = static_cast<int32_t>(variant->shared_bytes);
  if (shared_bytes > gpu.shared_bytes) {
    const auto kib = [](int32_t bytes) { return std::to_string(bytes / 1024) + " KiB"; };
    throw std::invalid_argument("the kernel needs " + kib(shared_bytes) +
                                " of shared memory, and GPU " + std::to_string(gpu.ordinal) +
                                ", of compute capability " + std::to_string(gpu.major) + "." +
                                std::to_string(gpu.minor) + ", has " + kib(gpu.shared_bytes) +
                                " for a thread block. Use implementation=\"xla\"");
  }
  return *variant;
}

}  // namespace

Gpu gpu_properties(int32_t ordinal) {
  Gpu gpu{.ordinal = ordinal, .major = 0, .minor = 0, .multiprocessors = 0, .shared_bytes = 0};
  const auto get = [&](cudaDeviceAttr attribute, int32_t* value) {
    check_cuda(cudaDeviceGetAttribute(value, attribute, ordinal), "cudaDeviceGetAttribute");
  };
  get(cudaDevAttrComputeCapabilityMajor, &gpu.major);
  get(cudaDevAttrComputeCapabilityMinor, &gpu.minor);
  get(cudaDevAttrMultiProcessorCount, &gpu.multiprocessors);
  get(cudaDevAttrMaxSharedMemoryPerBlockOptin, &gpu.shared_bytes);
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

void load(const Configuration& configuration, const Gpu& gpu) {
  const KernelVariant& variant = *configuration.variant;
  const void* const kernel = configuration.kernel;
  const DeviceGuard guard(gpu.ordinal);
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "loading the kernel");
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(variant.shared_bytes)),
             "shared memory of the kernel");
  int ctas = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, kernel, variant.threads,
                                                           variant.shared_bytes),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  if (ctas < 1) {
    throw std::runtime_error("a CTA of the kernel does not fit on a multiprocessor of GPU " +
                             std::to_string(gpu.ordinal));
  }
}

}  // namespace flashmoe::cuda
