// Matrix products and vector loops of one thread, compiled for several instruction sets of which
// the best that the CPU has is chosen at run time.
#pragma once

#include <cstdint>
#include <string_view>
#include <type_traits>
#include <vector>

#include "kernels/cpu/activation.h"
#include "kernels/cpu/storage.h"

namespace flashmoe::cpu::simd {

// A row-major matrix whose rows are `stride` elements apart.
template <typename T>
struct MatrixView {
  T* data = nullptr;
  int64_t stride = 0;
};

enum class Transpose : bool { kNo, kYes };

template <typename S>
struct Operand {
  const S* data;
  int64_t stride;
  Transpose transpose = Transpose::kNo;
};

// c [m, n] = op(a) [m, k] @ op(b) [k, n] (+ c), summed in float. Where `rounded` is given, it takes
// the result, in the storage type, instead of c. The result overlaps no operand.
//
// Element (i, j) is one chain of additions over ascending k, from 0 or from c. Its bits depend on
// row i of op(a), column j of op(b), k and the instruction set, and on nothing else: neither on m,
// n and strides, so blocks of rows or columns may be cut anywhere, nor on alignment or thread. What
// the chain adds: products, each rounded with the sum (by a fused multiply-add) where the
// instruction set has that, else twice. BFloat16 with avx512_bf16: pairs of products; with amx: the
// sum of the even and the sum of the odd products of 32 neighbours; both take subnormal numbers for
// zeros, in `rounded` too.
template <typename S>
struct Product {
  int64_t m, n, k;
  Operand<S> a, b;
  MatrixView<float> c{};
  MatrixView<S> rounded{};
  bool accumulate = false;  // only with c
};

// What the first FFN products of a tile leave behind: floats without bias. Null data: absent.
template <typename S>
struct PreActivations {
  MatrixView<const float> product;  // [rows, columns]
  const S* bias = nullptr;          // [columns] or null
};

// activated [rows, columns] = act(gate) * up; without a gate act(up).
template <typename S>
struct ActivationTile {
  int64_t rows, columns;
  PreActivations<S> gate{}, up{};
  MatrixView<S> kept_gate{}, kept_up{};  // where to keep gate and up, bias included; or null
  MatrixView<S> activated;
};

// From da = d loss / d activated, before the slot weight w of its row:
//   d_gate = w da up act'(gate), d_up = w da act(gate), weighted = w act(gate) up,
//   share = the sum of da act(gate) up over the columns.
// Without a gate: d_up = w da act'(up), weighted = w act(up), share = the sum of da act(up).
template <typename S>
struct GradientTile {
  int64_t rows, columns;
  MatrixView<const float> da;
  PreActivations<S> gate{}, up{};              // if they are not kept
  MatrixView<const S> kept_gate{}, kept_up{};  // what forward kept, or null
  const float* weights;                        // [rows]
  MatrixView<S> d_gate{}, d_up, weighted;
  MatrixView<float> shares;  // [rows], `stride` apart
};

// The loops round to nearest even, as from_float does, and add in float, rows in ascending order.
template <typename S>
struct Kernels {
  void (*multiply)(const Product<S>&);
  // Indexed by the activation.
  void (*activate[kActivations])(const ActivationTile<S>&);
  void (*activation_gradient[kActivations])(const GradientTile<S>&);
  // to[c] = from[c] + bias[c]; bias may be null.
  void (*round_row)(const float* from, const S* bias, S* to, int64_t columns);
  // to[c] = the sum of weights[r] * rows[r][c]; weights may be null, which stands for ones.
  void (*sum_rows)(const S* const* rows, const float* weights, int64_t count, S* to,
                   int64_t columns);
  // The same of the rows of a matrix.
  void (*sum_matrix_rows)(MatrixView<const S> rows, const float* weights, int64_t count, S* to,
                          int64_t columns);
  float (*dot)(const S* a, const S* b, int64_t count);
};

struct KernelSet {
  const char* name;
  Kernels<float> float32;
  Kernels<BFloat16> bfloat16;
  Kernels<Float16> float16;

  template <typename S>
  const Kernels<S>& of() const {
    if constexpr (std::is_same_v<S, float>) {
      return float32;
    } else if constexpr (std::is_same_v<S, BFloat16>) {
      return bfloat16;
    } else {
      return float16;
    }
  }
};

// Those that this CPU can run, each a superset of the one before it: portable, and on x86-64 avx2,
// avx512, avx512_bf16, amx.
const std::vector<KernelSet>& supported_kernels();

// The set with this name, or the one to prefer on this CPU if the name is empty. Throws
// std::invalid_argument for any name that is not among the supported ones.
const KernelSet& find_kernels(std::string_view name);

// find_kernels of the environment variable FLASHMOE_CPU_ISA, asked for once per process.
const KernelSet& kernel_set();

template <typename S>
const Kernels<S>& kernels() {
  return kernel_set().of<S>();
}

}  // namespace flashmoe::cpu::simd
