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

#include "kernels/cpu/pe_call.h"

namespace flashmoe::cpu {
namespace {

template <typename S>
class Backward final : public PeCall {
 public:
  Backward(const CallConfig& config, HeapGroup& heaps, int32_t me, int32_t workers,
           const BackwardBuffers& buffers)
      : PeCall(config, heaps, me, workers), buffers_(buffers) {}

 private:
  enum TileBuffer { kRows, kPanel, kPreGate, kPreUp, kOut };
  enum ArenaBuffer { kGradGate, kGradUp, kWeighted, kPartials };

  bool gated() const { return buffers_.experts.gate != nullptr; }

  const RoutedTokens& tokens() const override { return buffers_.tokens; }
  TileCounts tile_counts() const override {
    const int32_t tiles = shape_.intermediate_tiles();
    return {tiles, shape_.hidden_tiles(), tiles};
  }
  void prepare(Arena& arena, int64_t rows) override {
    const int64_t width = shape_.intermediate;
    if (gated()) d_gate_ = arena.reserve(kGradGate, rows * width);
    d_up_ = arena.reserve(kGradUp, rows * width);
    weighted_ = arena.reserve(kWeighted, rows * width);
    partials_ = arena.reserve(kPartials, rows * shape_.intermediate_tiles());
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

    const Matrix da{buffers.reserve(kOut, rows * count), count};
    const S* down =
        static_cast<const S*>(buffers_.experts.down) + (expert * width + begin) * hidden;
    multiply(rows, count, hidden, as_float(dy_rows(first), hidden, rows, hidden, buffers, kRows),
             Transpose::kNo, as_float(down, hidden, count, hidden, buffers, kPanel),
             Transpose::kYes, da, false);
    const float* gate = nullptr;
    if (gated()) {
      gate = pre_activation(tile, buffers_.experts.gate, buffers_.experts.gate_bias,
                            buffers_.kept.pre_gate, kPreGate, buffers);
    }
    const float* up = pre_activation(tile, buffers_.experts.up, buffers_.experts.up_bias,
                                     buffers_.kept.pre_up, kPreUp, buffers);

    const float* weight = exchange_.heap().weight() + first;
    with_activation(config_.activation, [&]<Activation kKind>() {
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (first + r) * width + begin;
        const float* d = da.data + r * count;
        const float* u = up + r * count;
        const float w = weight[r];
        float* du = d_up_ + at;
        float* wa = weighted_ + at;
        float share = 0.0f;
        if (gated()) {
          const float* g = gate + r * count;
          float* dg = d_gate_ + at;
          for (int64_t c = 0; c < count; ++c) {
            const auto [value, slope] = activate<kKind>(g[c]);
            wa[c] = w * value * u[c];
            dg[c] = w * d[c] * u[c] * slope;
            du[c] = w * d[c] * value;
          }
          for (int64_t c = 0; c < count; ++c) share += d[c] * activate<kKind>(g[c]).value * u[c];
        } else {
          for (int64_t c = 0; c < count; ++c) {
            const auto [value, slope] = activate<kKind>(u[c]);
            wa[c] = w * value;
            du[c] = w * d[c] * slope;
          }
          for (int64_t c = 0; c < count; ++c) share += d[c] * activate<kKind>(u[c]).value;
        }
        partials_[(first + r) * shape_.intermediate_tiles() + tile.column] = share;
      }
    });
  }

  // Pre-activations of a tile as floats [rows, columns of the tile], kept by forward or computed
  // again.
  const float* pre_activation(const core::Tile& tile, const void* weights, const void* bias,
                              const void* kept, TileBuffer buffer, TileBuffers& buffers) {
    const auto [begin, count] = columns_of(tile, shape_, shape_.intermediate);
    const int64_t hidden = shape_.hidden, width = shape_.intermediate;
    const int64_t first = exchange_.first_row(tile), rows = exchange_.rows(tile);
    const Matrix pre{buffers.reserve(buffer, rows * count), count};
    if (kept != nullptr) {
      convert(static_cast<const S*>(kept) + first * width + begin, width, pre.data, count, rows,
              count);
      return pre.data;
    }
    const int64_t expert = tile.expert % shape_.local_experts();
    const S* slice = static_cast<const S*>(weights) + expert * hidden * width + begin;
    multiply(rows, count, hidden, as_float(x_rows(first), hidden, rows, hidden, buffers, kRows),
             Transpose::kNo, as_float(slice, width, hidden, count, buffers, kPanel), Transpose::kNo,
             pre, false);
    if (bias != nullptr) {
      const S* values = static_cast<const S*>(bias) + expert * width + begin;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < count; ++c) pre.data[r * count + c] += to_float(values[c]);
      }
    }
    return pre.data;
  }

  // Columns of dx, put back to their slots; the first ones bring the gradient of the weight along.
  void second_tile(const core::Tile& tile, TileBuffers& buffers) override {
    const auto [begin, count] = columns_of(tile, shape_, shape_.hidden);
    const int64_t hidden = shape_.hidden, width = shape_.intermediate;
    const int64_t expert = tile.expert % shape_.local_experts();
    const int64_t first = exchange_.first_row(tile), rows = exchange_.rows(tile);
    const Matrix dx{buffers.reserve(kOut, rows * count), count};
    const auto add = [&](const float* gradients, const void* weights, bool accumulate) {
      const S* slice = static_cast<const S*>(weights) + (expert * hidden + begin) * width;
      multiply(rows, count, width, {gradients + first * width, width}, Transpose::kNo,
               as_float(slice, width, count, width, buffers, kPanel), Transpose::kYes, dx,
               accumulate);
    };
    if (gated()) add(d_gate_, buffers_.experts.gate, false);
    add(d_up_, buffers_.experts.up, gated());

    const float* d_weight = nullptr;
    if (tile.column == 0) {
      float* sums = buffers.reserve(kPreGate, rows);
      for (int64_t r = 0; r < rows; ++r) sums[r] = weight_gradient(first + r, expert);
      d_weight = sums;
    }
    exchange_.put_back<S>(tile, begin, count, dx.data, count, d_weight);
  }

  float weight_gradient(int64_t row, int64_t expert) {
    const int64_t hidden = shape_.hidden, tiles = shape_.intermediate_tiles();
    float sum = 0.0f;
    for (int64_t i = 0; i < tiles; ++i) sum += partials_[row * tiles + i];
    if (const auto* bias = static_cast<const S*>(buffers_.experts.down_bias)) {
      const S* dy = dy_rows(row);
      for (int64_t h = 0; h < hidden; ++h) {
        sum += to_float(dy[h]) * to_float(bias[expert * hidden + h]);
      }
    }
    return sum;
  }

  // The tile's columns of d w_gate and d w_up, its rows of d w_down, and the same of the biases.
  void weight_tile(const core::Tile& tile, TileBuffers& buffers) override {
    const auto [begin, count] = columns_of(tile, shape_, shape_.intermediate);
    const int64_t hidden = shape_.hidden, width = shape_.intermediate;
    const core::Plan& plan = exchange_.current_plan();
    const int64_t expert = tile.expert % shape_.local_experts();
    const int64_t first = plan.first_row[tile.expert], rows = plan.kept[tile.expert];
    const ExpertGradients& out = buffers_.d_experts;

    const ConstMatrix x = as_float(x_rows(first), hidden, rows, hidden, buffers, kRows);
    const auto input_weights = [&](const float* gradients, void* weights, void* bias) {
      const ConstMatrix d{gradients + first * width + begin, width};
      store_product(hidden, count, rows, x, d,
                    static_cast<S*>(weights) + expert * hidden * width + begin, width, buffers);
      if (bias != nullptr) {
        store_row_sum(d, rows, count, static_cast<S*>(bias) + expert * width + begin, buffers);
      }
    };
    if (gated()) input_weights(d_gate_, out.gate, out.gate_bias);
    input_weights(d_up_, out.up, out.up_bias);

    const ConstMatrix dy = as_float(dy_rows(first), hidden, rows, hidden, buffers, kRows);
    store_product(count, hidden, rows, {weighted_ + first * width + begin, width}, dy,
                  static_cast<S*>(out.down) + (expert * width + begin) * hidden, hidden, buffers);
    if (out.down_bias != nullptr && tile.column == 0) {
      float* scaled = buffers.reserve(kPanel, rows * hidden);
      const float* weight = exchange_.heap().weight() + first;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t h = 0; h < hidden; ++h) {
          scaled[r * hidden + h] = weight[r] * dy.data[r * dy.stride + h];
        }
      }
      store_row_sum({scaled, hidden}, rows, hidden,
                    static_cast<S*>(out.down_bias) + expert * hidden, buffers);
    }
  }

  // to [m, n] = a [k, m]^T @ b [k, n]
  static void store_product(int64_t m, int64_t n, int64_t k, ConstMatrix a, ConstMatrix b, S* to,
                            int64_t stride, TileBuffers& buffers) {
    if constexpr (std::is_same_v<S, float>) {
      multiply(m, n, k, a, Transpose::kYes, b, Transpose::kNo, {to, stride}, false);
    } else {
      const Matrix result{buffers.reserve(kOut, m * n), n};
      multiply(m, n, k, a, Transpose::kYes, b, Transpose::kNo, result, false);
      convert(result.data, n, to, stride, m, n);
    }
  }

  static void store_row_sum(ConstMatrix m, int64_t rows, int64_t columns, S* to,
                            TileBuffers& buffers) {
    float* sum = buffers.reserve(kOut, columns);
    std::fill_n(sum, columns, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) sum[c] += m.data[r * m.stride + c];
    }
    convert(sum, columns, to, columns, 1, columns);
  }

  // dx of a token is the plain sum over its slots: the slot weights are in it already.
  void combine(int64_t token_block) override {
    const int64_t hidden = shape_.hidden, k = shape_.experts_per_token;
    const S* returned = exchange_.heap().returned<S>();
    const float* returned_weight = exchange_.heap().returned_weight();
    const int64_t end = std::min<int64_t>(shape_.tokens, (token_block + 1) * shape_.block_tokens);
    thread_local std::vector<float> sum;
    for (int64_t t = token_block * shape_.block_tokens; t < end; ++t) {
      sum.assign(hidden, 0.0f);
      for (int64_t slot = t * k; slot < (t + 1) * k; ++slot) {
        const bool kept = exchange_.is_kept(slot);
        buffers_.d_weights[slot] = kept ? returned_weight[slot] : 0.0f;
        if (!kept) continue;
        const S* row = returned + slot * hidden;
        for (int64_t h = 0; h < hidden; ++h) sum[h] += to_float(row[h]);
      }
      convert(sum.data(), hidden, static_cast<S*>(buffers_.dx) + t * hidden, hidden, 1, hidden);
    }
  }

  const BackwardBuffers buffers_;
  float* d_gate_ = nullptr;    // [rows, D]
  float* d_up_ = nullptr;      // [rows, D]
  float* weighted_ = nullptr;  // [rows, D] w a
  float* partials_ = nullptr;  // [rows, intermediate tiles] shares of <da, a>
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
