// The kernels of compute capability 9.0, compiled for sm_90a alone.
#include "kernels/cuda/engine_sm90.h"
#include "kernels/cuda/global_kernel.cuh"

namespace flashmoe::cuda {

std::span<const KernelVariant> sm90_variants() {
  using core::BFloat16;
  using core::Float16;
  static const KernelVariant variants[] = {
      direct_variant<Sm90Engine<BFloat16, 128>>(),
      direct_variant<Sm90Engine<BFloat16, 64>>(),
      direct_variant<Sm90Engine<Float16, 128>>(),
      direct_variant<Sm90Engine<Float16, 64>>(),
      network_variant<Sm90Engine<BFloat16, kNetworkBlockRows>>(),
      network_variant<Sm90Engine<Float16, kNetworkBlockRows>>(),
  };
  return variants;
}

}  // namespace flashmoe::cuda
