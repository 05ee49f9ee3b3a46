// Which kernel computes a call, and the memory that it takes. Without CUDA: gpu.h asks a GPU.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/core/heap_layout.h"
#include "kernels/core/shape.h"
#include "kernels/core/types.h"
#include "kernels/cuda/network_layout.h"
#include "kernels/cuda/variants.h"
#include "kernels/cuda/workspace.h"

namespace flashmoe::cuda {

// What the kernel's fixed-size tables hold.
inline constexpr int32_t kExpertLimit = 512;
inline constexpr int32_t kExpertsPerTokenLimit = 16;
// Tensor maps and vector accesses want rows of whole 16-byte pieces.
inline constexpr int32_t kRowAlignment = 16;

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
  // Some PE of the group cannot address the heap of another one.
  bool network = false;

  int32_t element_bytes() const { return dtype == core::DType::kFloat32 ? 4 : 2; }
  friend bool operator==(const CallSizes&, const CallSizes&) = default;
};

struct Configuration {
  const KernelVariant* variant;
  const void* kernel;  // that is launched: the variant's, or one of NetworkKernels
  core::Shape shape;
  int32_t element_bytes;
  int32_t ctas;  // of each PE
  core::HeapLayout heap;
  NetworkLayout network;  // empty without the network transport
  WorkspaceLayout workspace;

  int64_t heap_bytes() const { return variant->network ? network.bytes : heap.bytes; }
  int64_t bytes() const { return heap_bytes() + workspace.bytes; }
};

// The kernel for a call, of those that there are for its GPU: the one with the row blocks that suit
// the call if there is one. Null: none has its element type and transport.
const KernelVariant* find_variant(std::span<const KernelVariant> variants, const CallSizes& sizes);

// Throws std::invalid_argument for sizes that the kernel does not take.
Configuration configure(const CallSizes& sizes, const KernelVariant& variant, int32_t ctas);

}  // namespace flashmoe::cuda
