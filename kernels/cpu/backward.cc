// The tasks of the backward pass. With a = act(g) * u (gated; else a = act(u)), one row x of an
// expert, its output o = a @ w_down + b_down, its slot weight w and the gradient dy of its token:
//
//     da = dy @ w_down^T               d weight = <dy, o> = <da, a> + <dy, b_down>
//     dg = w da * u * act'(g)          du = w da * act(g)
//     dx = dg @ w_gate^T + du @ w_up^T
//     d w_gate = x^T dg,  d w_up = x^T du,  d w_down = (w a)^T dy,  biases: sums over the rows
//
// The gradient of the slot weight needs no stored expert output. Weight gradients contract over the
// expert's rows in the order of the plan, in one product per tile, so their bits do not change from
// run to run.
#include <algorithm>
#include <memory>
#include <vector>

#include "kernels/cpu/pe_call.h"
#include "kernels/cpu/simd/kernels.h"

namespace flashmoe::cpu {
namespace {

template <typename S>
class Backward final : public PeCall {
 public:
  Backward(const CallConfig& config, HeapGroup& heaps, int32_t me, int32_t workers,
           const BackwardBuffers& buffers)
      : PeCall(config, heaps, me, workers), buffers_(buffers) {}

 private:
  enum TileBuffer { kGate, kUp, kOut, kGradWeight };
  enum ArenaBuffer { kGradGate, kGradUp, kWeighted, kShares };

  bool gated() const { return buffers_.experts.gate != nullptr; }

  const RoutedTokens& tokens() const override { return buffers_.tokens; }
  TileCounts tile_counts() const override {
    const int32_t tiles = shape_.intermediate_tiles();
    return {tiles, shape_.hidden_tiles(), tiles};
  }
  void prepare(Arena& arena, int64_t rows) override {
    const int64_t width = shape_.intermediate;
    if (gated()) d_gate_ = arena.reserve<S>(kGradGate, rows * width);
    d_up_ = arena.reserve<S>(kGradUp, rows * width);
    weighted_ = arena.reserve<S>(kWeighted, rows * width);
    shares_ = arena.reserve<float>(kShares, rows * shape_.intermediate_tiles());
    constexpr int64_t kElement = sizeof(S);
    const int64_t matrices = shape_.local_experts() * int64_t{shape_.hidden} * width * kElement;
    const ExpertGradients& out = buffers_.d_experts;
    for (void* matrix : {out.gate, out.up, out.down}) prepare_to_write(matrix, matrices);
    prepare_to_write(buffers_.dx, int64_t{shape_.tokens} * shape_.hidden * kElement);
  }

  void dispatch(int64_t step) override {
    const S* x = config_.traffic.resend_rows ? static_cast<const S*>(buffers_.tokens.x) : nullptr;
    exchange_.dispatch<S>(step, static_cast<const S*>(buffers_.dy), x, buffers_.tokens.weights);
  }

  // Rows of x of the expert, kept by forward or sent again.
  const S* x_rows(int64_t first) {
    const S* rows = config_.traffic.resend_rows ? exchange_.heap().recv_x<S>()
                                                : static_cast<const S*>(buffers_.kept.rows);
    return rows + first * shape_.hidden;
  }
  const S* dy_rows(int64_t first) { return exchange_.heap().recv<S>() + first * shape_.hidden; }

  // Columns of dg, du, w a, and their share of the gradient of the slot weight.
  void first_tile(const core::Tile& tile, TileBuffers& buffers) override {
    const auto [begin, count] = columns_of(tile, shape_, shape_.intermediate);
    const int64_t hidden = shape_.hidden, width = shape_.intermediate;
    const int64_t expert = tile.expert % shape_.local_experts();
    const int64_t first = exchange_.first_row(tile), rows = exchange_.rows(tile);
    const auto tile_of = [&]<typename T>(T* matrix) -> simd::MatrixView<T> {
      if (matrix == nullptr) return {};
      return {matrix + first * width + begin, width};
    };

    float* da = buffers.reserve<float>(kOut, rows * count);
    const S* down =
        static_cast<const S*>(buffers_.experts.down) + (expert * width + begin) * hidden;
    kernels_.multiply({.m = rows,
                       .n = count,
                       .k = hidden,
                       .a = {dy_rows(first), hidden},
                       .b = {down, hidden, simd::Transpose::kYes},
                       .c = {da, count}});
    const ExpertWeights& weights = buffers_.experts;
    const bool kept = buffers_.kept.pre_up != nullptr;
    const auto project = [&](const void* matrix, const void* bias,
                             TileBuffer buffer) -> simd::PreActivations<S> {
      if (matrix == nullptr || kept) return {};
      float* product = buffers.reserve<float>(buffer, rows * count);
      const S* slice = static_cast<const S*>(matrix) + expert * hidden * width + begin;
      kernels_.multiply({.m = rows,
                         .n = count,
                         .k = hidden,
                         .a = {x_rows(first), hidden},
                         .b = {slice, width},
                         .c = {product, count}});
      return {{product, count},
              bias ? static_cast<const S*>(bias) + expert * width + begin : nullptr};
    };
    const int64_t tiles = shape_.intermediate_tiles();
    kernels_.activation_gradient[static_cast<int>(config_.activation)](
        {.rows = rows,
         .columns = count,
         .da = {da, count},
         .gate = project(weights.gate, weights.gate_bias, kGate),
         .up = project(weights.up, weights.up_bias, kUp),
         .kept_gate = tile_of(static_cast<const S*>(buffers_.kept.pre_gate)),
         .kept_up = tile_of(static_cast<const S*>(buffers_.kept.pre_up)),
         .weights = exchange_.heap().weight() + first,
         .d_gate = tile_of(d_gate_),
         .d_up = tile_of(d_up_),
         .weighted = tile_of(weighted_),
         .shares = {shares_ + first * tiles + tile.column, tiles}});
  }

  // Columns of dx, put back to their slots; the first ones bring the gradient of the weight along.
  void second_tile(const core::Tile& tile, TileBuffers& buffers) override {
    const auto [begin, count] = columns_of(tile, shape_, shape_.hidden);
    const int64_t hidden = shape_.hidden, width = shape_.intermediate;
    const int64_t expert = tile.expert % shape_.local_experts();
    const int64_t first = exchange_.first_row(tile), rows = exchange_.rows(tile);
    float* dx = buffers.reserve<float>(kOut, rows * count);
    const auto add = [&](const S* gradients, const void* weights, bool accumulate) {
      const S* slice = static_cast<const S*>(weights) + (expert * hidden + begin) * width;
      kernels_.multiply({.m = rows,
                         .n = count,
                         .k = width,
                         .a = {gradients + first * width, width},
                         .b = {slice, width, simd::Transpose::kYes},
                         .c = {dx, count},
                         .accumulate = accumulate});
    };
    if (gated()) add(d_gate_, buffers_.experts.gate, false);
    add(d_up_, buffers_.experts.up, gated());

    float* d_weight = nullptr;
    if (tile.column == 0) {
      d_weight = buffers.reserve<float>(kGradWeight, rows);
      for (int64_t r = 0; r < rows; ++r) d_weight[r] = weight_gradient(first + r, expert);
    }
    exchange_.put_back<S>(tile, begin, {dx, count}, count, nullptr, d_weight);
  }

  float weight_gradient(int64_t row, int64_t expert) {
    const int64_t hidden = shape_.hidden, tiles = shape_.intermediate_tiles();
    float sum = 0.0f;
    for (int64_t i = 0; i < tiles; ++i) sum += shares_[row * tiles + i];
    if (const auto* bias = static_cast<const S*>(buffers_.experts.down_bias)) {
      sum += kernels_.dot(dy_rows(row), bias + expert * hidden, hidden);
    }
    return sum;
  }

  // The tile's columns of d w_gate and d w_up, its rows of d w_down, and the same of the biases.
  void weight_tile(const core::Tile& tile, TileBuffers&) override {
    const auto [begin, count] = columns_of(tile, shape_, shape_.intermediate);
    const int64_t hidden = shape_.hidden, width = shape_.intermediate;
    const core::Plan& plan = exchange_.current_plan();
    const int64_t expert = tile.expert % shape_.local_experts();
    const int64_t first = plan.first_row[tile.expert], rows = plan.kept[tile.expert];
    const ExpertGradients& out = buffers_.d_experts;

    // to [m, n] = a [rows, m]^T @ b [rows, n]
    const auto contract = [&](int64_t m, int64_t n, simd::MatrixView<const S> a,
                              simd::MatrixView<const S> b, S* to, int64_t stride) {
      kernels_.multiply({.m = m,
                         .n = n,
                         .k = rows,
                         .a = {a.data, a.stride, simd::Transpose::kYes},
                         .b = {b.data, b.stride},
                         .rounded = {to, stride}});
    };
    const auto input_weights = [&](const S* gradients, void* matrix, void* bias) {
      const simd::MatrixView<const S> d{gradients + first * width + begin, width};
      contract(hidden, count, {x_rows(first), hidden}, d,
               static_cast<S*>(matrix) + expert * hidden * width + begin, width);
      if (bias != nullptr) {
        kernels_.sum_matrix_rows(d, nullptr, rows, static_cast<S*>(bias) + expert * width + begin,
                                 count);
      }
    };
    if (gated()) input_weights(d_gate_, out.gate, out.gate_bias);
    input_weights(d_up_, out.up, out.up_bias);

    const simd::MatrixView<const S> dy{dy_rows(first), hidden};
    contract(count, hidden, {weighted_ + first * width + begin, width}, dy,
             static_cast<S*>(out.down) + (expert * width + begin) * hidden, hidden);
    if (out.down_bias != nullptr && tile.column == 0) {
      kernels_.sum_matrix_rows(dy, exchange_.heap().weight() + first, rows,
                               static_cast<S*>(out.down_bias) + expert * hidden, hidden);
    }
  }

  // dx of a token is the plain sum over its slots: the slot weights are in it already.
  void combine(int64_t token_block) override {
    const int64_t hidden = shape_.hidden, k = shape_.experts_per_token;
    const S* returned = exchange_.heap().returned<S>();
    const float* returned_weight = exchange_.heap().returned_weight();
    const int64_t end = std::min<int64_t>(shape_.tokens, (token_block + 1) * shape_.block_tokens);
    thread_local std::vector<const S*> rows;
    for (int64_t t = token_block * shape_.block_tokens; t < end; ++t) {
      rows.clear();
      for (int64_t slot = t * k; slot < (t + 1) * k; ++slot) {
        const bool kept = exchange_.is_kept(slot);
        buffers_.d_weights[slot] = kept ? returned_weight[slot] : 0.0f;
        if (kept) rows.push_back(returned + slot * hidden);
      }
      kernels_.sum_rows(rows.data(), nullptr, std::ssize(rows),
                        static_cast<S*>(buffers_.dx) + t * hidden, hidden);
    }
  }

  const simd::Kernels<S>& kernels_ = simd::kernels<S>();
  const BackwardBuffers buffers_;
  S* d_gate_ = nullptr;      // [rows, D]
  S* d_up_ = nullptr;        // [rows, D]
  S* weighted_ = nullptr;    // [rows, D] w a
  float* shares_ = nullptr;  // [rows, intermediate tiles] of <da, a>
};

}  // namespace

std::unique_ptr<PeCall> make_backward(const CallConfig& config, HeapGroup& heaps, int32_t me,
                                      int32_t workers, const BackwardBuffers& buffers) {
  switch (config.dtype) {
    case DType::kBFloat16:
      return std::make_unique<Backward<BFloat16>>(config, heaps, me, workers, buffers);
    case DType::kFloat16:
      return std::make_unique<Backward<Float16>>(config, heaps, me, workers, buffers);
    case DType::kFloat32:
      break;
  }
  return std::make_unique<Backward<float>>(config, heaps, me, workers, buffers);
}

}  // namespace flashmoe::cpu
