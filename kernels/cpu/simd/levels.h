// What is compiled once per instruction set.
#pragma once

#include "kernels/cpu/simd/kernels.h"

namespace flashmoe::cpu::simd {

namespace portable {
extern const KernelSet kKernels;
}
namespace avx2 {
extern const KernelSet kKernels;
}
namespace avx512 {
extern const KernelSet kKernels;
}
// These two add a product to what avx512 has.
namespace avx512_bf16 {
void multiply(const Product<BFloat16>& p);
}
namespace amx {
void multiply(const Product<BFloat16>& p);
}

}  // namespace flashmoe::cpu::simd
