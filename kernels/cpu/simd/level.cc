// All kernels for the instruction set that this file is compiled for.
#include "kernels/cpu/simd/levels.h"
#include "kernels/cpu/simd/loops.h"
#include "kernels/cpu/simd/multiply.h"

namespace flashmoe::cpu::simd::FLASHMOE_SIMD_LEVEL {
namespace {

template <typename S, int... kKind>
constexpr Kernels<S> kernels_of(std::integer_sequence<int, kKind...>) {
  return {multiply_by_tiles<float, S>,
          {activate<Activation{kKind}, S>...},
          {activation_gradient<Activation{kKind}, S>...},
          round_row<S>,
          sum_rows<S>,
          sum_matrix_rows<S>,
          dot<S>};
}
constexpr auto kAll = std::make_integer_sequence<int, kActivations>{};

}  // namespace

// Constant, not computed when the program starts: by then nobody has asked the CPU what it can.
constinit const KernelSet kKernels{"", kernels_of<float>(kAll), kernels_of<BFloat16>(kAll),
                                   kernels_of<Float16>(kAll)};

}  // namespace flashmoe::cpu::simd::FLASHMOE_SIMD_LEVEL
