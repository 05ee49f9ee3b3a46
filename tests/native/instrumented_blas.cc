// Takes the place of the BLAS product, which no sanitizer has seen compiled: touches every element
// of the operands and of the result in instrumented code, and lets the real product run in between.
// So the sanitizers see who multiplies what, and when.
#include <cblas.h>
#include <dlfcn.h>

#include <cstdint>

namespace {

void read(const float* matrix, int64_t rows, int64_t columns, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      static_cast<void>(*static_cast<const volatile float*>(matrix + r * stride + c));
    }
  }
}

void write(float* matrix, int64_t rows, int64_t columns, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      volatile float* element = matrix + r * stride + c;
      *element = *element;
    }
  }
}

}  // namespace

extern "C" void scipy_cblas_sgemm(const CBLAS_ORDER order, const CBLAS_TRANSPOSE transpose_a,
                                  const CBLAS_TRANSPOSE transpose_b, const blasint m,
                                  const blasint n, const blasint k, const float alpha,
                                  const float* a, const blasint lda, const float* b,
                                  const blasint ldb, const float beta, float* c,
                                  const blasint ldc) {
  static const auto real =
      reinterpret_cast<decltype(&scipy_cblas_sgemm)>(dlsym(RTLD_NEXT, "scipy_cblas_sgemm"));
  const bool a_is_transposed = transpose_a == CblasTrans;
  const bool b_is_transposed = transpose_b == CblasTrans;
  read(a, a_is_transposed ? k : m, a_is_transposed ? m : k, lda);
  read(b, b_is_transposed ? n : k, b_is_transposed ? k : n, ldb);
  if (beta != 0) read(c, m, n, ldc);
  real(order, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  write(c, m, n, ldc);
}
