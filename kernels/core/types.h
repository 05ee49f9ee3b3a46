// The element types and activations of a layer, on any backend.
#pragma once

#include <cstdint>

namespace flashmoe::core {

enum class DType { kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The values are part of the FFI attributes; flashmoe_jax/fused.py lists the same names in order.
enum class Activation : int64_t { kSilu, kGelu, kGeluTanh, kRelu, kRelu2 };
inline constexpr int kActivations = static_cast<int>(Activation::kRelu2) + 1;

}  // namespace flashmoe::core
