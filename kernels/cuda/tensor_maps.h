// Descriptions of tensors for the copy engine of compute capability 9.0 (CUDA driver API,
// cuTensorMapEncodeTiled), as kernels/device/tma.h wants them.
#pragma once

#include "kernels/cuda/kernel_arguments.h"
#include "kernels/device/tensor_map.h"

namespace flashmoe::cuda {

// Throws std::runtime_error where the driver refuses.
device::TensorMap encode_tensor_map(const TiledTensor& tensor);

}  // namespace flashmoe::cuda
