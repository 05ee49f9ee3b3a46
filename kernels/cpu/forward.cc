// The tasks of the forward pass.
#include <algorithm>
#include <memory>
#include <vector>

#include "kernels/cpu/pe_call.h"
#include "kernels/cpu/simd/kernels.h"

namespace flashmoe::cpu {
namespace {

template <typename S>
class Forward final : public PeCall {
 public:
  Forward(const CallConfig& config, HeapGroup& heaps, int32_t me, int32_t workers,
          const ForwardBuffers& buffers)
      : PeCall(config, heaps, me, workers), buffers_(buffers) {}

 private:
  enum TileBuffer { kGate, kUp, kOut };

  const RoutedTokens& tokens() const override { return buffers_.tokens; }
  TileCounts tile_counts() const override {
    return {shape_.intermediate_tiles(), shape_.hidden_tiles(), 0};
  }
  void prepare(Arena& arena, int64_t rows) override {
    activated_ = arena.reserve<S>(0, rows * shape_.intermediate);
    *buffers_.dropped = exchange_.dropped();
    constexpr int64_t kElement = sizeof(S);
    const int64_t width = shape_.intermediate;
    prepare_to_write(buffers_.y, shape_.tokens * shape_.hidden * kElement);
    prepare_to_write(buffers_.kept.rows, rows * shape_.hidden * kElement);
    prepare_to_write(buffers_.kept.pre_gate, rows * width * kElement);
    prepare_to_write(buffers_.kept.pre_up, rows * width * kElement);
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
    const auto project = [&](const void* weights, const void* bias,
                             TileBuffer buffer) -> simd::PreActivations<S> {
      if (weights == nullptr) return {};
      const int64_t expert = tile.expert % shape_.local_experts();
      float* product = buffers.reserve<float>(buffer, rows * count);
      const S* slice = static_cast<const S*>(weights) + expert * hidden * width + begin;
      kernels_.multiply({.m = rows,
                         .n = count,
                         .k = hidden,
                         .a = {received, hidden},
                         .b = {slice, width},
                         .c = {product, count}});
      return {{product, count},
              bias ? static_cast<const S*>(bias) + expert * width + begin : nullptr};
    };
    const auto tile_of = [&](void* matrix) -> simd::MatrixView<S> {
      if (matrix == nullptr) return {};
      return {static_cast<S*>(matrix) + first * width + begin, width};
    };
    const ExpertWeights& weights = buffers_.experts;
    kernels_.activate[static_cast<int>(config_.activation)](
        {.rows = rows,
         .columns = count,
         .gate = project(weights.gate, weights.gate_bias, kGate),
         .up = project(weights.up, weights.up_bias, kUp),
         .kept_gate = tile_of(buffers_.kept.pre_gate),
         .kept_up = tile_of(buffers_.kept.pre_up),
         .activated = tile_of(activated_)});
  }

  // Columns of the expert's output, put where they are wanted.
  void second_tile(const core::Tile& tile, TileBuffers& buffers) override {
    const auto [begin, count] = columns_of(tile, shape_, shape_.hidden);
    const int64_t hidden = shape_.hidden, width = shape_.intermediate;
    const int64_t expert = tile.expert % shape_.local_experts();
    const int64_t rows = exchange_.rows(tile);
    float* out = buffers.reserve<float>(kOut, rows * count);
    const S* slice = static_cast<const S*>(buffers_.experts.down) + expert * width * hidden + begin;
    kernels_.multiply({.m = rows,
                       .n = count,
                       .k = width,
                       .a = {activated_ + exchange_.first_row(tile) * width, width},
                       .b = {slice, hidden},
                       .c = {out, count}});
    const auto* bias = static_cast<const S*>(buffers_.experts.down_bias);
    exchange_.put_back<S>(tile, begin, {out, count}, count,
                          bias ? bias + expert * hidden + begin : nullptr, nullptr);
  }

  void weight_tile(const core::Tile&, TileBuffers&) override {}

  void combine(int64_t token_block) override {
    const int64_t hidden = shape_.hidden, k = shape_.experts_per_token;
    const S* returned = exchange_.heap().returned<S>();
    const int64_t end = std::min<int64_t>(shape_.tokens, (token_block + 1) * shape_.block_tokens);
    thread_local std::vector<const S*> rows;
    thread_local std::vector<float> weights;
    for (int64_t t = token_block * shape_.block_tokens; t < end; ++t) {
      rows.clear();
      weights.clear();
      for (int64_t slot = t * k; slot < (t + 1) * k; ++slot) {
        if (!exchange_.is_kept(slot)) continue;
        rows.push_back(returned + slot * hidden);
        weights.push_back(buffers_.tokens.weights[slot]);
      }
      kernels_.sum_rows(rows.data(), weights.data(), std::ssize(rows),
                        static_cast<S*>(buffers_.y) + t * hidden, hidden);
    }
  }

  const simd::Kernels<S>& kernels_ = simd::kernels<S>();
  const ForwardBuffers buffers_;
  S* activated_ = nullptr;  // [rows, D]
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
