// From a call to what the kernel is given. Without CUDA, so that the emulator launches exactly what
// a GPU does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/core/types.h"
#include "kernels/cuda/arguments.h"
#include "kernels/cuda/call.h"
#include "kernels/cuda/configuration.h"
#include "kernels/device/tensor_map.h"

namespace flashmoe::cuda {

// A tensor of which TMA copies boxes.
struct TiledTensor {
  const void* data;
  core::DType dtype;
  int64_t columns, rows, planes;  // innermost first
  int32_t box_columns, box_rows;  // of one copy, which is one plane deep
};

using EncodeTensorMap = device::TensorMap(const TiledTensor& tensor);

// The arguments of a launch of PEs `first_pe`, `first_pe + 1`, ...; see launch() for the others.
KernelArguments kernel_arguments(const Configuration& configuration, const Call& call,
                                 int32_t first_pe, std::span<std::byte* const> heaps,
                                 std::span<const PePlace> places,
                                 std::span<const PeBuffers> buffers, EncodeTensorMap* encode,
                                 std::span<const int32_t> processes = {});

}  // namespace flashmoe::cuda
