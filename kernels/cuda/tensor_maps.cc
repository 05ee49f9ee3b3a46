#include "kernels/cuda/tensor_maps.h"

#include <stdexcept>
#include <string>

#include "kernels/cuda/driver.h"

namespace flashmoe::cuda {
namespace {

CUtensorMapDataType data_type(core::DType dtype) {
  switch (dtype) {
    case core::DType::kFloat32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    case core::DType::kBFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case core::DType::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  }
  throw std::invalid_argument("unknown element type");
}

}  // namespace

device::TensorMap encode_tensor_map(const TiledTensor& tensor) {
  const cuuint64_t element = tensor.dtype == core::DType::kFloat32 ? 4 : 2;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(tensor.columns),
                              static_cast<cuuint64_t>(tensor.rows),
                              static_cast<cuuint64_t>(tensor.planes)};
  const cuuint64_t strides[] = {sizes[0] * element, sizes[0] * sizes[1] * element};  // bytes
  const cuuint32_t box[] = {static_cast<cuuint32_t>(tensor.box_columns),
                            static_cast<cuuint32_t>(tensor.box_rows), 1};
  const cuuint32_t steps[] = {1, 1, 1};
  CUtensorMap map;
  static const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(
      driver_function("cuTensorMapEncodeTiled", 12000));
  const CUresult result =
      encode(&map, data_type(tensor.dtype), 3, const_cast<void*>(tensor.data), sizes, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled refuses a tensor [" +
                             std::to_string(tensor.planes) + "][" + std::to_string(tensor.rows) +
                             "][" + std::to_string(tensor.columns) + "] with error " +
                             std::to_string(result));
  }
  return device::TensorMap::from(map);
}

}  // namespace flashmoe::cuda
