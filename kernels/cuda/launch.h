// One launch of the kernel: the PEs of one GPU execute the operator once.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/cuda/call.h"
#include "kernels/cuda/configuration.h"

namespace flashmoe::cuda {

// Launches PEs `first_pe`, `first_pe + 1`, ... on the current GPU. `heaps` has the heap of each of
// the group's PEs, as this GPU addresses it. Throws if CUDA refuses the launch, as it does when not
// all of its CTAs could run at the same time. With the network transport, a heap that this GPU
// cannot address is null, and `processes` are NVSHMEM's numbers of the PEs.
void launch(const Configuration& configuration, const Call& call, int32_t first_pe,
            std::span<std::byte* const> heaps, std::span<const PePlace> places,
            std::span<const PeBuffers> buffers, cudaStream_t stream,
            std::span<const int32_t> processes = {});

}  // namespace flashmoe::cuda
