// The router's products: logits [T][E] = x [T][H] router [H][E], accurate to float32, for tokens
// and experts of a CTA. The depth goes through shared memory in stages; see router_product.h for
// the products.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/router_product.h"
#include "kernels/device/async_copy.h"
#include "kernels/device/barrier.h"
#include "kernels/device/identity.h"
#include "kernels/device/mbarrier.h"

namespace flashmoe::cuda {

// The least. Copies overlap with products only where two stages fit.
inline constexpr size_t kGateSharedBytes = 72 * 1024;

struct LogitsArguments {
  const void* x;        // [tokens][hidden] elements; hidden is a multiple of 16 bytes of them
  const float* router;  // [hidden][num_experts]
  float* logits;        // [tokens][num_experts]
  int32_t hidden;
  int32_t num_experts;
};

namespace internal {

inline constexpr int kMaxRouterStages = 6;  // copies of 5 are in flight
inline constexpr int kRouterStagesOffset = 128;

// What the warps of a CTA compute at once: `tiles` tiles of tokens, each by `parts` warps that have
// `quads` quads of columns. The order of a logit's sums does not depend on it.
struct WarpLayout {
  int quads;
  int parts;
  int tiles;

  static FLASHMOE_DEVICE WarpLayout of(int warps, int max_quads, int tokens, int all_quads) {
    const int token_tiles = (tokens + kTileTokens - 1) / kTileTokens;
    const int fewest = (all_quads + max_quads - 1) / max_quads;
    int parts = token_tiles < warps ? warps / token_tiles : 1;
    parts = parts < fewest ? fewest : parts;
    parts = parts > all_quads ? all_quads : parts;
    WarpLayout layout;
    layout.quads = (all_quads + parts - 1) / parts;
    layout.parts = (all_quads + layout.quads - 1) / layout.quads;
    layout.tiles = warps / layout.parts;
    layout.tiles = layout.tiles > token_tiles ? token_tiles : layout.tiles;
    return layout;
  }
};

// What one CTA computes.
struct LogitsBlock {
  int32_t first_token;
  int32_t last_token;
  int32_t first_expert;
  int32_t last_expert;
};

// A position of a walk over the stages: depths within passes over the tokens.
struct RouterStage {
  int index = 0;
  uint32_t parity = 0;
  int32_t depth = 0;
  int32_t token;  // the first of the pass

  FLASHMOE_DEVICE void next(int stages, int hidden, int pass_tokens) {
    if (++index == stages) {
      index = 0;
      parity ^= 1;
    }
    depth += kStageDepth;
    if (depth >= hidden) {
      depth = 0;
      token += pass_tokens;
    }
  }
};

// This thread's part in filling the stages: columns 4 lane + [0, 4), and so on, of every kWarps-th
// router row, and 16 bytes of every kThreads / 4-th token.
template <typename Element, int kThreads>
class RouterCopies {
 public:
  FLASHMOE_DEVICE RouterCopies(const LogitsArguments& arguments, const LogitsBlock& block,
                               const RouterLayout<Element>& layout)
      : arguments_(arguments), block_(block), layout_(layout) {
    const uint32_t warp = device::warp_index();
    const uint32_t lane = device::lane_index();
#pragma unroll
    for (uint32_t i = 0; i < kRows; ++i) {
      row_target_[i] = Layout::router_offset(lane / 8, Lines::row(i * kWarps + warp), lane % 8);
    }
    warp_ = warp;
    const uint32_t token = device::thread_index() / 4;
    token_target_ = layout.token_offset(token / kTileTokens, 0, token % kTileTokens, lane % 4);
  }

  // Fills a stage. What lies outside of the tensors becomes 0.
  FLASHMOE_DEVICE void copy(const RouterStage& at, std::byte* stage, device::Mbarrier* full) const {
    const int32_t depths = arguments_.hidden - at.depth;
    const int32_t lane = device::lane_index();
    const float* router =
        arguments_.router + int64_t{at.depth} * arguments_.num_experts + block_.first_expert;
    if (vectors()) {
      const int32_t experts = block_.last_expert - block_.first_expert;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int32_t d = i * kWarps + warp_;
        if (d < kStageDepth) {
          const float* source = router + d * arguments_.num_experts;
          std::byte* target = stage + row_target_[i];
#pragma unroll 1
          for (int32_t column = 4 * lane; column < layout_.quads * kQuadColumns; column += 128) {
            device::async_copy_16(target, source + column, d < depths && column < experts ? 16 : 0);
            target += 128 / kQuadColumns * Layout::kQuadBytes;
          }
        }
      }
    } else {
      copy_single_floats(router, depths, stage);
    }

    const int32_t depth = lane % 4 * Lines::kWidth;
    const int32_t tokens = block_.last_token - at.token;
    const int32_t full_tiles = (tokens + kTileTokens - 1) / kTileTokens;
    const int32_t rows = (full_tiles < layout_.tiles ? full_tiles : layout_.tiles) * kTileTokens;
    const Element* x = static_cast<const Element*>(arguments_.x) +
                       int64_t{at.token} * arguments_.hidden + at.depth;
    std::byte* target = stage + token_target_;
#pragma unroll 1
    for (int32_t row = device::thread_index() / 4; row < rows; row += kThreads / 4) {
      const Element* source = x + (row * arguments_.hidden + depth);
#pragma unroll
      for (int i = 0; i < Lines::kBlocks; ++i) {
        const bool exists = row < tokens && depth + i * Lines::kBlock < depths;
        device::async_copy_16(target + i * Layout::kBlockBytes, source + i * Lines::kBlock,
                              exists ? 16 : 0);
      }
      target += kThreads / 4 / kTileTokens * Layout::kTileBytes;
    }
    if (!vectors()) device::mbarrier_arrive(full);
    device::async_copy_arrive(full);
  }

  // Arrivals at a stage's barrier.
  FLASHMOE_DEVICE int arrivals() const { return vectors() ? kThreads : 2 * kThreads; }

 private:
  using Lines = Depth<Element>;
  using Layout = RouterLayout<Element>;
  static constexpr int kWarps = kThreads / device::kWarpSize;
  static constexpr int kRows = (kStageDepth + kWarps - 1) / kWarps;
  static_assert(kThreads / 4 % kTileTokens == 0);

  // Whether the router's rows are aligned to 16 bytes.
  FLASHMOE_DEVICE bool vectors() const { return arguments_.num_experts % 4 == 0; }

  FLASHMOE_DEVICE void copy_single_floats(const float* router, int32_t depths,
                                          std::byte* stage) const {
    const int32_t experts = block_.last_expert - block_.first_expert;
    const int32_t columns = layout_.quads * kQuadColumns;
#pragma unroll 1
    for (int32_t d = warp_; d < kStageDepth; d += kWarps) {
#pragma unroll 1
      for (int32_t column = device::lane_index(); column < columns; column += device::kWarpSize) {
        float* chunk = reinterpret_cast<float*>(
            stage +
            Layout::router_offset(column / kQuadColumns, Lines::row(d), column % kQuadColumns / 4));
        const bool exists = d < depths && column < experts;
        chunk[column % 4] = exists ? router[d * arguments_.num_experts + column] : 0.0f;
      }
    }
  }

  const LogitsArguments& arguments_;
  const LogitsBlock& block_;
  const RouterLayout<Element>& layout_;
  int32_t warp_;
  uint32_t row_target_[kRows];
  uint32_t token_target_;
};

template <int kMaxQuads>
FLASHMOE_DEVICE void store_logits(const LogitsArguments& arguments, const LogitsBlock& block,
                                  int32_t first_token, int first_quad, int quads,
                                  const RouterSums<kMaxQuads>& sums) {
  const bool vectors = arguments.num_experts % 4 == 0;
  for_each_result(sums, quads, [&](int quad, int token, int column, const FourFloats& four) {
    token += first_token;
    const int32_t expert = block.first_expert + (first_quad + quad) * kQuadColumns + column;
    if (token >= block.last_token) return;
    float* target = arguments.logits + int64_t{token} * arguments.num_experts + expert;
    if (vectors && expert < block.last_expert) {
      *reinterpret_cast<FourFloats*>(target) = four;
    } else if (!vectors) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (expert + j < block.last_expert) target[j] = four.v[j];
      }
    }
  });
}

}  // namespace internal

// The logits of tokens [first_token, last_token) for experts [first_expert, last_expert), of which
// the first is a multiple of 4 and the last too, unless it is num_experts. By all threads of the
// CTA, with its dynamic shared memory, at least kGateSharedBytes; all of it is free again when it
// returns, and the threads of the CTA see the logits. A logit's bits depend on its token and its
// expert, not on what else is computed where.
template <typename Element, int kThreads>
FLASHMOE_DEVICE void router_logits(const LogitsArguments& arguments, int32_t first_token,
                                   int32_t last_token, int32_t first_expert, int32_t last_expert,
                                   std::byte* shared, size_t shared_bytes) {
  using namespace internal;
  if (first_token >= last_token || first_expert >= last_expert) return;
  constexpr int kWarps = kThreads / device::kWarpSize;
  constexpr int kMaxQuads = 16 / kWarps + (16 % kWarps != 0);  // 512 experts at once
  const LogitsBlock block{first_token, last_token, first_expert, last_expert};
  const int all_quads = (last_expert - first_expert + kQuadColumns - 1) / kQuadColumns;
  const WarpLayout warps = WarpLayout::of(kWarps, kMaxQuads, last_token - first_token, all_quads);
  const int pass_tokens = warps.tiles * kTileTokens;
  const RouterLayout<Element> layout{all_quads, warps.tiles};
  const int room = (static_cast<int>(shared_bytes) - kRouterStagesOffset) / layout.bytes();
  const int stages = room < kMaxRouterStages ? room : kMaxRouterStages;
  device::Mbarrier* full = reinterpret_cast<device::Mbarrier*>(shared);
  std::byte* first_stage = shared + kRouterStagesOffset;
  const RouterCopies<Element, kThreads> copies(arguments, block, layout);

  if (device::thread_index() == 0) {
    for (int i = 0; i < stages; ++i) device::mbarrier_init(&full[i], copies.arrivals());
    device::fence_mbarrier_init();
  }
  device::block_sync();

  RouterStage copied{.token = first_token};
  const auto copy_next = [&] {
    if (copied.token >= last_token) return;
    copies.copy(copied, first_stage + copied.index * layout.bytes(), &full[copied.index]);
    copied.next(stages, arguments.hidden, pass_tokens);
  };
  for (int i = 0; i + 1 < stages; ++i) copy_next();

  const int tile = device::warp_index() / warps.parts;
  const int first_quad = device::warp_index() % warps.parts * warps.quads;
  const int quads_left = all_quads - first_quad;
  const int quads = quads_left < warps.quads ? quads_left : warps.quads;
  RouterStage at{.token = first_token};
  while (at.token < last_token) {
    const int32_t token = at.token + tile * kTileTokens;
    const bool has_tile = tile < warps.tiles && token < last_token;
    RouterSums<kMaxQuads> sums = {};
    do {
      // After a block_sync all have left the stage before this one: it can be filled again.
      if (stages == 1) {
        device::block_sync();
        copy_next();
      }
      device::mbarrier_wait(&full[at.index], at.parity);
      if (stages > 1) {
        device::block_sync();
        copy_next();
      }
      if (has_tile) {
        multiply_stage(layout, first_stage + at.index * layout.bytes(), tile, first_quad, quads,
                       sums);
      }
      at.next(stages, arguments.hidden, pass_tokens);
    } while (at.depth != 0);
    if (has_tile) store_logits(arguments, block, token, first_quad, quads, sums);
  }
  device::block_sync();
  if (device::thread_index() == 0) {
    for (int i = 0; i < stages; ++i) device::mbarrier_invalidate(&full[i]);
  }
  device::block_sync();
}

}  // namespace flashmoe::cuda
