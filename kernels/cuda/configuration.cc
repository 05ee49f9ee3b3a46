#include "kernels/cuda/configuration.h"

#include <stdexcept>
#include <string>

namespace flashmoe::cuda {
namespace {

// Rows of a tile. Where experts get few rows, half of a large tile would be computed for nothing.
int32_t wanted_block_rows(const CallSizes& sizes) {
  constexpr int64_t kFewRows = 64;
  const int64_t slots = int64_t{sizes.num_pes} * sizes.tokens * sizes.experts_per_token;
  return slots <= kFewRows * sizes.num_experts ? 64 : 128;
}

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

void check(const CallSizes& sizes) {
  require(sizes.num_pes >= 1 && sizes.tokens >= 0 && sizes.hidden >= 1 && sizes.intermediate >= 1 &&
              sizes.num_experts >= 1 && sizes.experts_per_token >= 1 && sizes.max_rows >= 0,
          "every size of a call but the number of tokens must be at least 1");
  require(sizes.num_experts % sizes.num_pes == 0, "the experts must divide among the PEs");
  require(sizes.num_experts <= kExpertLimit,
          "the kernel takes at most " + std::to_string(kExpertLimit) + " experts");
  require(
      sizes.experts_per_token <= kExpertsPerTokenLimit,
      "the kernel takes at most " + std::to_string(kExpertsPerTokenLimit) + " experts per token");
  for (const int32_t width : {sizes.hidden, sizes.intermediate}) {
    require(int64_t{width} * sizes.element_bytes() % kRowAlignment == 0,
            "a row of " + std::to_string(width) + " elements must be a multiple of " +
                std::to_string(kRowAlignment) + " bytes");
  }
}

}  // namespace

const KernelVariant* find_variant(std::span<const KernelVariant> variants, const CallSizes& sizes) {
  const int32_t wanted = wanted_block_rows(sizes);
  const bool is_float = sizes.dtype == core::DType::kFloat32;
  const KernelVariant* found = nullptr;
  for (const KernelVariant& variant : variants) {
    if (variant.dtype != sizes.dtype || (is_float && variant.exact != sizes.exact)) continue;
    if (variant.network != sizes.network) continue;
    if (variant.block_rows == wanted) return &variant;
    if (found == nullptr) found = &variant;
  }
  return found;
}

Configuration configure(const CallSizes& sizes, const KernelVariant& variant, int32_t ctas) {
  check(sizes);
  const core::Shape shape{
      .num_pes = sizes.num_pes,
      .tokens = sizes.tokens,
      .hidden = sizes.hidden,
      .intermediate = sizes.intermediate,
      .num_experts = sizes.num_experts,
      .experts_per_token = sizes.experts_per_token,
      .capacity = sizes.capacity,
      .max_rows = sizes.max_rows,
      .block_rows = variant.block_rows,
      .block_tokens = 1,
      .block_columns = variant.columns,
  };
  const int32_t element_bytes = sizes.element_bytes();
  const core::HeapLayout heap(
      shape,
      core::Traffic{.backward = false, .resend_rows = false, .element_bytes = element_bytes});
  return {
      .variant = &variant,
      .kernel = variant.kernel,
      .shape = shape,
      .element_bytes = element_bytes,
      .ctas = ctas,
      .heap = heap,
      .network = variant.network ? NetworkLayout(shape, heap) : NetworkLayout(),
      .workspace = WorkspaceLayout(shape, ctas, element_bytes),
  };
}

}  // namespace flashmoe::cuda
