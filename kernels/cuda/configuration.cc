#include "kernels/cuda/configuration.h"

#include <cuda_runtime_api.h>

#include <span>
#include <stdexcept>
#include <string>

#include "kernels/cuda/memory.h"

namespace flashmoe::cuda {
namespace {

// Rows of a tile. Where experts get few rows, half of a large tile would be computed for nothing.
int32_t wanted_block_rows(const CallSizes& sizes) {
  constexpr int64_t kFewRows = 64;
  const int64_t slots = int64_t{sizes.num_pes} * sizes.tokens * sizes.experts_per_token;
  return slots <= kFewRows * sizes.num_experts ? 64 : 128;
}

const KernelVariant* find(std::span<const KernelVariant> variants, const CallSizes& sizes) {
  const int32_t wanted = wanted_block_rows(sizes);
  const bool is_float = sizes.dtype == core::DType::kFloat32;
  const KernelVariant* found = nullptr;
  for (const KernelVariant& variant : variants) {
    if (variant.dtype != sizes.dtype || (is_float && variant.exact != sizes.exact)) continue;
    if (variant.block_rows == wanted) return &variant;
    if (found == nullptr) found = &variant;
  }
  return found;
}

const KernelVariant& choose_variant(const CallSizes& sizes, const Gpu& gpu) {
  const KernelVariant* variant = nullptr;
  if (gpu.major == 9 && gpu.minor == 0) variant = find(sm90_variants(), sizes);
  if (variant == nullptr && gpu.major >= 8) variant = find(sm80_variants(), sizes);
  if (variant == nullptr) {
    throw std::invalid_argument("GPU " + std::to_string(gpu.ordinal) + " has compute capability " +
                                std::to_string(gpu.major) + "." + std::to_string(gpu.minor) +
                                ", for which this package has no kernel of that element type; "
                                "the least is 8.0");
  }
  return *variant;
}

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

void check(const CallSizes& sizes) {
  require(sizes.num_pes >= 1 && sizes.tokens >= 0 && sizes.hidden >= 1 && sizes.intermediate >= 1 &&
              sizes.num_experts >= 1 && sizes.experts_per_token >= 1 && sizes.max_rows >= 0,
          "every size of a call but the number of tokens must be at least 1");
  require(sizes.num_experts % sizes.num_pes == 0, "the experts must divide among the PEs");
  require(sizes.num_experts <= kExpertLimit,
          "the kernel takes at most " + std::to_string(kExpertLimit) + " experts");
  require(
      sizes.experts_per_token <= kExpertsPerTokenLimit,
      "the kernel takes at most " + std::to_string(kExpertsPerTokenLimit) + " experts per token");
  for (const int32_t width : {sizes.hidden, sizes.intermediate}) {
    require(int64_t{width} * sizes.element_bytes() % kRowAlignment == 0,
            "a row of " + std::to_string(width) + " elements must be a multiple of " +
                std::to_string(kRowAlignment) + " bytes");
  }
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
  check(sizes);
  const KernelVariant& variant = choose_variant(sizes, gpu);
  const core::Shape shape{
      .num_pes = sizes.num_pes,
      .tokens = sizes.tokens,
      .hidden = sizes.hidden,
      .intermediate = sizes.intermediate,
      .num_experts = sizes.num_experts,
      .experts_per_token = sizes.experts_per_token,
      .capacity = sizes.capacity,
      .max_rows = sizes.max_rows,
      .block_rows = variant.block_rows,
      .block_tokens = 1,
      .block_columns = variant.columns,
  };
  const int32_t element_bytes = sizes.element_bytes();
  const int32_t ctas = gpu.multiprocessors / pes_per_gpu;
  require(ctas >= 1, "GPU " + std::to_string(gpu.ordinal) + " has fewer multiprocessors than PEs");
  return {
      .variant = &variant,
      .shape = shape,
      .element_bytes = element_bytes,
      .ctas = ctas,
      .heap = core::HeapLayout(
          shape,
          core::Traffic{.backward = false, .resend_rows = false, .element_bytes = element_bytes}),
      .workspace = WorkspaceLayout(shape, ctas, element_bytes),
  };
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
