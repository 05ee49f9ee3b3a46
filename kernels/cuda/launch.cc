#include "kernels/cuda/launch.h"

#include "kernels/cuda/kernel_arguments.h"
#include "kernels/cuda/memory.h"
#include "kernels/cuda/tensor_maps.h"

namespace flashmoe::cuda {

void launch(const Configuration& configuration, const Call& call, int32_t first_pe,
            std::span<std::byte* const> heaps, std::span<const PePlace> places,
            std::span<const PeBuffers> buffers, cudaStream_t stream,
            std::span<const int32_t> processes) {
  KernelArguments arguments = kernel_arguments(configuration, call, first_pe, heaps, places,
                                               buffers, &encode_tensor_map, processes);
  const KernelVariant& variant = *configuration.variant;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(static_cast<unsigned>(configuration.ctas) * static_cast<unsigned>(buffers.size()));
  config.blockDim = dim3(static_cast<unsigned>(variant.threads));
  config.dynamicSmemBytes = variant.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  void* parameters[] = {&arguments};
  check_cuda(cudaLaunchKernelExC(&config, configuration.kernel, parameters),
             "launching the kernel");
}

}  // namespace flashmoe::cuda
