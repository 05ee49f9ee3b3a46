// The kernels of compute capability 9.0, compiled for sm_90a alone.
#include "kernels/cuda/engine_sm90.h"
#include "kernels/cuda/global_kernel.cuh"

namespace flashmoe::cuda {

std::span<const KernelVariant> sm90_variants() {
  using core::BFloat16;
  using core::DType;
  using core::Float16;
  static const KernelVariant variants[] = {
      variant<Sm90Engine<BFloat16, 128>>(DType::kBFloat16, true, true),
      variant<Sm90Engine<BFloat16, 64>>(DType::kBFloat16, true, true),
      variant<Sm90Engine<Float16, 128>>(DType::kFloat16, true, true),
      variant<Sm90Engine<Float16, 64>>(DType::kFloat16, true, true),
      network_variant<Sm90Engine<BFloat16, kNetworkBlockRows>>(DType::kBFloat16, true, true),
      network_variant<Sm90Engine<Float16, kNetworkBlockRows>>(DType::kFloat16, true, true),
  };
  return variants;
}

}  // namespace flashmoe::cuda
