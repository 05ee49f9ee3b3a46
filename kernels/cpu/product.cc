#include "kernels/cpu/product.h"

#include <cblas.h>

#include <algorithm>

namespace flashmoe::cpu {
namespace {

// The engine brings the threads; the BLAS must not start its own.
const bool kSingleThreaded = [] {
  scipy_openblas_set_num_threads(1);
  return true;
}();

}  // namespace

void multiply(int64_t m, int64_t n, int64_t k, ConstMatrix a, Transpose transpose_a, ConstMatrix b,
              Transpose transpose_b, Matrix c, bool accumulate) {
  static_cast<void>(kSingleThreaded);
  if (m == 0 || n == 0) return;
  if (k == 0) {
    if (accumulate) return;
    for (int64_t r = 0; r < m; ++r) std::fill_n(c.data + r * c.stride, n, 0.0f);
    return;
  }
  const auto op = [](Transpose t) { return t == Transpose::kYes ? CblasTrans : CblasNoTrans; };
  scipy_cblas_sgemm(CblasRowMajor, op(transpose_a), op(transpose_b), static_cast<blasint>(m),
                    static_cast<blasint>(n), static_cast<blasint>(k), 1.0f, a.data,
                    static_cast<blasint>(a.stride), b.data, static_cast<blasint>(b.stride),
                    accumulate ? 1.0f : 0.0f, c.data, static_cast<blasint>(c.stride));
}

}  // namespace flashmoe::cpu
