// The kernels of 16-bit types for compute capability 8.0 and later, compiled for sm_80.
#include "kernels/cuda/engine_sm80.h"
#include "kernels/cuda/global_kernel.cuh"

namespace flashmoe::cuda {

std::span<const KernelVariant> sm80_variants() {
  using core::BFloat16;
  using core::Float16;
  static const KernelVariant variants[] = {
      direct_variant<Sm80Engine<BFloat16, 128>>(),
      direct_variant<Sm80Engine<BFloat16, 64>>(),
      direct_variant<Sm80Engine<Float16, 128>>(),
      direct_variant<Sm80Engine<Float16, 64>>(),
      network_variant<Sm80Engine<BFloat16, kNetworkBlockRows>>(),
      network_variant<Sm80Engine<Float16, kNetworkBlockRows>>(),
  };
  return variants;
}

}  // namespace flashmoe::cuda
