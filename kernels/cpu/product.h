// Matrix products of one thread, in float, by the BLAS.
#pragma once

#include <cstdint>

namespace flashmoe::cpu {

enum class Transpose : bool { kNo, kYes };

// A row-major matrix whose rows are `stride` elements apart.
template <typename T>
struct MatrixView {
  T* data;
  int64_t stride;
};

using ConstMatrix = MatrixView<const float>;
using Matrix = MatrixView<float>;

// c [m, n] = op(a) [m, k] @ op(b) [k, n] (+ c, if accumulate). The bits of the result depend on the
// sizes and the values only, and not on who calls.
void multiply(int64_t m, int64_t n, int64_t k, ConstMatrix a, Transpose transpose_a, ConstMatrix b,
              Transpose transpose_b, Matrix c, bool accumulate);

}  // namespace flashmoe::cpu
