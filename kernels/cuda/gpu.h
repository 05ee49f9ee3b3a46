// What a GPU is, and which kernel runs a call on it.
#pragma once

#include <cstdint>

#include "kernels/cuda/configuration.h"
#include "kernels/cuda/variants.h"

namespace flashmoe::cuda {

struct Gpu {
  int32_t ordinal;
  int32_t major, minor;  // compute capability
  int32_t multiprocessors;
  int32_t shared_bytes;  // that a CTA may have
};

// Of the CUDA device, by its ordinal.
Gpu gpu_properties(int32_t ordinal);

// For a GPU that runs `pes_per_gpu` of the PEs. Throws std::invalid_argument for sizes that the
// kernel does not take, and for a GPU for which none was compiled or which is too small for it.
Configuration configure(const CallSizes& sizes, const Gpu& gpu, int32_t pes_per_gpu);

// Loads the kernel and lets it use its shared memory, so that no launch has to: loading waits for
// the GPU, which a running peer may never leave. Throws if a CTA does not fit on a multiprocessor.
void load(const Configuration& configuration, const Gpu& gpu);

}  // namespace flashmoe::cuda
