// Which kernel computes a call, on how many CTAs, and the memory that it takes there.
#pragma once

#include <cstdint>

#include "kernels/core/heap_layout.h"
#include "kernels/core/shape.h"
#include "kernels/core/types.h"
#include "kernels/cuda/variants.h"
#include "kernels/cuda/workspace.h"

namespace flashmoe::cuda {

// What the kernel's fixed-size tables hold.
inline constexpr int32_t kExpertLimit = 512;
inline constexpr int32_t kExpertsPerTokenLimit = 16;
// Tensor maps and vector accesses want rows of whole 16-byte pieces.
inline constexpr int32_t kRowAlignment = 16;

struct Gpu {
  int32_t ordinal;
  int32_t major, minor;  // compute capability
  int32_t multiprocessors;
};

// Of the CUDA device, by its ordinal.
Gpu gpu_properties(int32_t ordinal);

// The sizes of a call, before anything is chosen.
struct CallSizes {
  int32_t num_pes;
  int32_t tokens;
  int32_t hidden;
  int32_t intermediate;
  int32_t num_experts;
  int32_t experts_per_token;
  int64_t capacity;  // or core::kNoCapacity
  int64_t max_rows;
  core::DType dtype;
  bool exact;  // float products with the error of float; else TF32

  int32_t element_bytes() const { return dtype == core::DType::kFloat32 ? 4 : 2; }
  friend bool operator==(const CallSizes&, const CallSizes&) = default;
};

struct Configuration {
  const KernelVariant* variant;
  core::Shape shape;
  int32_t element_bytes;
  int32_t ctas;  // of each PE
  core::HeapLayout heap;
  WorkspaceLayout workspace;

  int64_t bytes() const { return heap.bytes + workspace.bytes; }
};

// For a GPU that runs `pes_per_gpu` of the PEs. Throws std::invalid_argument for sizes that the
// kernel does not take and for a GPU that none was compiled for.
Configuration configure(const CallSizes& sizes, const Gpu& gpu, int32_t pes_per_gpu);

// Loads the kernel and lets it use its shared memory, so that no launch has to: loading waits for
// the GPU, which a running peer may never leave. Throws if a CTA does not fit on a multiprocessor.
void load(const KernelVariant& variant, const Gpu& gpu);

}  // namespace flashmoe::cuda
