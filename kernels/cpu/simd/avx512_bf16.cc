// Products of BFloat16 by the dot product instruction of AVX512_BF16.
#include "kernels/cpu/simd/levels.h"
#include "kernels/cpu/simd/multiply.h"

namespace flashmoe::cpu::simd::avx512_bf16 {

void multiply(const Product<BFloat16>& p) { multiply_by_tiles<Pair>(p); }

}  // namespace flashmoe::cpu::simd::avx512_bf16
