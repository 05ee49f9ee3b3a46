// The kernels that were compiled, as tables: one for each translation unit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/core/types.h"

namespace flashmoe::cuda {

// Of all kernels with the network transport.
inline constexpr int kNetworkBlockRows = 64;

struct KernelVariant {
  core::DType dtype;
  bool exact;           // float only: 3xTF32, whose error is that of float; else plain TF32
  int32_t block_rows;   // rows of a tile: 128, or 64 for few tokens
  int32_t columns;      // weight columns of a tile, the gate's and the up-projection's together
  int32_t threads;      // of a CTA
  size_t shared_bytes;  // dynamic
  bool tensor_maps;     // reads PeArguments::maps
  bool network;         // has NetworkTransport; else DirectTransport
  const void* kernel;   // __global__ void(const __grid_constant__ KernelArguments); null with the
                        // network transport, see NetworkKernels
};

// For compute capability 8.0 and later: of 16-bit types, and of float. They take 114 to 158 KiB of
// shared memory. GPUs of 8.6, 8.9 and 12.x give a CTA 99 KiB, and are refused (configure in gpu.h).
std::span<const KernelVariant> sm80_variants();
std::span<const KernelVariant> sm80_float_variants();
// For compute capability 9.0 alone (sm_90a).
std::span<const KernelVariant> sm90_variants();

}  // namespace flashmoe::cuda
