// The kernels of float for compute capability 8.0 and later, compiled for sm_80 and, as there are
// none for sm_90a, for sm_90.
#include "kernels/cuda/engine_sm80.h"
#include "kernels/cuda/global_kernel.cuh"

namespace flashmoe::cuda {

std::span<const KernelVariant> sm80_float_variants() {
  constexpr FloatProduct kTf32 = FloatProduct::kTf32;
  static const KernelVariant variants[] = {
      direct_variant<Sm80Engine<float, 128>>(),
      direct_variant<Sm80Engine<float, 64>>(),
      direct_variant<Sm80Engine<float, 128, kTf32>>(),
      direct_variant<Sm80Engine<float, 64, kTf32>>(),
      network_variant<Sm80Engine<float, kNetworkBlockRows>>(),
  };
  return variants;
}

}  // namespace flashmoe::cuda
