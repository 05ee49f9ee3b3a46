// The device code of the kernels with the network transport (network_sm80.cu, network_sm90.cu). It
// is linked with NVSHMEM's device library by the compiler of CUDA alone and embedded as data: so
// the module needs no part of NVSHMEM to be loaded, and the other kernels are compiled as if there
// were none.
#pragma once

#include <cstddef>
#include <span>

namespace flashmoe::cuda {

// For GPUs of compute capability 8.x. Empty: this module was built without it.
std::span<const std::byte> network_image_sm80();
// For those of 9.0.
std::span<const std::byte> network_image_sm90();

}  // namespace flashmoe::cuda
