// Descriptions of tensors for the copy engine of compute capability 9.0 (CUDA driver API,
// cuTensorMapEncodeTiled), as kernels/device/tma.h wants them.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/core/types.h"

namespace flashmoe::cuda {

struct TiledTensor {
  const void* data;
  core::DType dtype;
  int64_t columns, rows, planes;  // innermost first
  int32_t box_columns, box_rows;  // of one copy, which is one plane deep
};

// Throws std::runtime_error where the driver refuses.
CUtensorMap tensor_map(const TiledTensor& tensor);

}  // namespace flashmoe::cuda
