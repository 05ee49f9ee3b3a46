// The kernels of 16-bit types for compute capability 8.0 and later, compiled for sm_80.
#include "kernels/cuda/engine_sm80.h"
#include "kernels/cuda/global_kernel.cuh"

namespace flashmoe::cuda {

std::span<const KernelVariant> sm80_variants() {
  using core::BFloat16;
  using core::DType;
  using core::Float16;
  static const KernelVariant variants[] = {
      variant<Sm80Engine<BFloat16, 128>>(DType::kBFloat16, true, false),
      variant<Sm80Engine<BFloat16, 64>>(DType::kBFloat16, true, false),
      variant<Sm80Engine<Float16, 128>>(DType::kFloat16, true, false),
      variant<Sm80Engine<Float16, 64>>(DType::kFloat16, true, false),
      network_variant<Sm80Engine<BFloat16, kNetworkBlockRows>>(DType::kBFloat16, true, false),
      network_variant<Sm80Engine<Float16, kNetworkBlockRows>>(DType::kFloat16, true, false),
  };
  return variants;
}

}  // namespace flashmoe::cuda
