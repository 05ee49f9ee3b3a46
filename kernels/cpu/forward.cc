// The tasks of the forward pass.
#include <algorithm>
#include <memory>

#include "kernels/cpu/pe_call.h"

namespace flashmoe::cpu {
namespace {

template <typename S>
class Forward final : public PeCall {
 public:
  Forward(const CallConfig& config, HeapGroup& heaps, int32_t me, int32_t workers,
          const ForwardBuffers& buffers)
      : PeCall(config, heaps, me, workers), buffers_(buffers) {}

 private:
  enum TileBuffer { kRows, kPanel, kPreGate, kPreUp, kOut };

  const RoutedTokens& tokens() const override { return buffers_.tokens; }
  TileCounts tile_counts() const override {
    return {shape_.intermediate_tiles(), shape_.hidden_tiles(), 0};
  }
  void prepare(Arena& arena, int64_t rows) override {
    activated_ = arena.reserve(0, rows * shape_.intermediate);
    *buffers_.dropped = exchange_.dropped();
  }

  void dispatch(int64_t step) override {
    exchange_.dispatch<S>(step, static_cast<const S*>(buffers_.tokens.x), nullptr, nullptr);
  }

  // Columns of act(rows @ w_gate) * (rows @ w_up), or of act(rows @ w_up).
  void first_tile(const core::Tile& tile, TileBuffers& buffers) override {
    const auto [begin, count] = columns_of(tile, shape_, shape_.intermediate);
    const int64_t hidden = shape_.hidden, width = shape_.intermediate;
    const int64_t first = exchange_.first_row(tile), rows = exchange_.rows(tile);
    const S* received = exchange_.heap().recv<S>() + first * hidden;
    if (buffers_.kept.rows != nullptr && tile.column == 0) {
      std::copy_n(received, rows * hidden, static_cast<S*>(buffers_.kept.rows) + first * hidden);
    }
    const ConstMatrix x = as_float(received, hidden, rows, hidden, buffers, kRows);
    const auto project = [&](const void* weights, const void* bias, TileBuffer buffer,
                             void* kept) -> const float* {
      if (weights == nullptr) return nullptr;
      const int64_t expert = tile.expert % shape_.local_experts();
      const Matrix pre{buffers.reserve(buffer, rows * count), count};
      const S* slice = static_cast<const S*>(weights) + expert * hidden * width + begin;
      multiply(rows, count, hidden, x, Transpose::kNo,
               as_float(slice, width, hidden, count, buffers, kPanel), Transpose::kNo, pre, false);
      if (bias != nullptr) {
        add_to_rows(pre, rows, count, static_cast<const S*>(bias) + expert * width + begin);
      }
      if (kept != nullptr) {
        convert(pre.data, count, static_cast<S*>(kept) + first * width + begin, width, rows, count);
      }
      return pre.data;
    };
    const ExpertWeights& weights = buffers_.experts;
    const float* gate = project(weights.gate, weights.gate_bias, kPreGate, buffers_.kept.pre_gate);
    const float* up = project(weights.up, weights.up_bias, kPreUp, buffers_.kept.pre_up);
    with_activation(config_.activation, [&]<Activation kKind>() {
      for (int64_t r = 0; r < rows; ++r) {
        float* out = activated_ + (first + r) * width + begin;
        const float* u = up + r * count;
        if (gate != nullptr) {
          const float* g = gate + r * count;
          for (int64_t c = 0; c < count; ++c) out[c] = activate<kKind>(g[c]).value * u[c];
        } else {
          for (int64_t c = 0; c < count; ++c) out[c] = activate<kKind>(u[c]).value;
        }
      }
    });
  }

  // Columns of the expert's output, put where they are wanted.
  void second_tile(const core::Tile& tile, TileBuffers& buffers) override {
    const auto [begin, count] = columns_of(tile, shape_, shape_.hidden);
    const int64_t hidden = shape_.hidden, width = shape_.intermediate;
    const int64_t expert = tile.expert % shape_.local_experts();
    const int64_t rows = exchange_.rows(tile);
    const Matrix out{buffers.reserve(kOut, rows * count), count};
    const S* slice = static_cast<const S*>(buffers_.experts.down) + expert * width * hidden + begin;
    multiply(rows, count, width, {activated_ + exchange_.first_row(tile) * width, width},
             Transpose::kNo, as_float(slice, hidden, width, count, buffers, kPanel), Transpose::kNo,
             out, false);
    if (const void* bias = buffers_.experts.down_bias) {
      add_to_rows(out, rows, count, static_cast<const S*>(bias) + expert * hidden + begin);
    }
    exchange_.put_back<S>(tile, begin, count, out.data, count, nullptr);
  }

  void weight_tile(const core::Tile&, TileBuffers&) override {}

  void combine(int64_t token_block) override {
    const int64_t hidden = shape_.hidden, k = shape_.experts_per_token;
    const S* returned = exchange_.heap().returned<S>();
    const int64_t end = std::min<int64_t>(shape_.tokens, (token_block + 1) * shape_.block_tokens);
    thread_local std::vector<float> sum;
    for (int64_t t = token_block * shape_.block_tokens; t < end; ++t) {
      sum.assign(hidden, 0.0f);
      for (int64_t slot = t * k; slot < (t + 1) * k; ++slot) {
        if (!exchange_.is_kept(slot)) continue;
        const float weight = buffers_.tokens.weights[slot];
        const S* row = returned + slot * hidden;
        for (int64_t h = 0; h < hidden; ++h) sum[h] += weight * to_float(row[h]);
      }
      convert(sum.data(), hidden, static_cast<S*>(buffers_.y) + t * hidden, hidden, 1, hidden);
    }
  }

  static void add_to_rows(Matrix m, int64_t rows, int64_t columns, const S* bias) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) m.data[r * m.stride + c] += to_float(bias[c]);
    }
  }

  const ForwardBuffers buffers_;
  float* activated_ = nullptr;  // [rows, D]
};

}  // namespace

std::unique_ptr<PeCall> make_forward(const CallConfig& config, HeapGroup& heaps, int32_t me,
                                     int32_t workers, const ForwardBuffers& buffers) {
  switch (config.dtype) {
    case DType::kBFloat16:
      return std::make_unique<Forward<BFloat16>>(config, heaps, me, workers, buffers);
    case DType::kFloat16:
      return std::make_unique<Forward<Float16>>(config, heaps, me, workers, buffers);
    case DType::kFloat32:
      break;
  }
  return std::make_unique<Forward<float>>(config, heaps, me, workers, buffers);
}

}  // namespace flashmoe::cpu
