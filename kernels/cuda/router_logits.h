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

  // In place: the emulator does not see where the result of a function is stored.
  FLASHMOE_DEVICE void choose(int warps, int max_quads, int tokens, int all_quads) {
    const int token_tiles = (tokens + kTileTokens - 1) / kTileTokens;
    const int fewest = (all_quads + max_quads - 1) / max_quads;
    int wanted = token_tiles < warps ? warps / token_tiles : 1;
    wanted = wanted < fewest ? fewest : wanted;
    wanted = wanted > all_quads ? all_quads : wanted;
    quads = (all_quads + wanted - 1) / wanted;
    parts = (all_quads + quads - 1) / quads;
    const int room = warps / parts;
    tiles = room > token_tiles ? token_tiles : room;
  }
};

// What one CTA computes.
struct LogitsBlock {
  int32_t first_token;
  int32_t last_token;
  int32_t first_expert;
  int32_t last_expert;
};

// What the threads of a CTA share beside the stages. They read it where they need it: the registers
// are for the sums.
template <typename Element>
struct RouterShared {
  device::Mbarrier full[kMaxRouterStages];
  LogitsArguments arguments;
  LogitsBlock block;
  WarpLayout warps;
  RouterLayout<Element> layout;
  int stages;

  FLASHMOE_DEVICE std::byte* stage(int i) {
    return reinterpret_cast<std::byte*>(this) + kRouterStagesOffset + i * layout.bytes();
  }
  // Of this warp: its tile in each pass over the tokens, and the first of its quads.
  FLASHMOE_DEVICE int tile() const { return device::warp_index() / warps.parts; }
  FLASHMOE_DEVICE int first_quad() const {
    return device::warp_index() % warps.parts * warps.quads;
  }
  // How many quads a warp has from that one on.
  FLASHMOE_DEVICE int quads_from(int first) const {
    const int left = layout.quads - first;
    return left < warps.quads ? left : warps.quads;
  }
  // Whether the router's rows are aligned to 16 bytes.
  FLASHMOE_DEVICE bool vectors() const { return arguments.num_experts % 4 == 0; }
};

// A position of a walk over the stages: depths within passes over the tokens.
struct RouterPosition {
  int32_t token;  // the first of the pass
  int32_t depth = 0;

  FLASHMOE_DEVICE void advance(int hidden, int pass_tokens) {
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
struct RouterCopies {
  RouterShared<Element>& shared;

  // Fills a stage. What lies outside of the tensors becomes 0.
  FLASHMOE_DEVICE void copy(const RouterPosition& at, int stage) const {
    copy_router(at, shared.stage(stage));
    copy_tokens(at, shared.stage(stage));
    if (!shared.vectors()) device::mbarrier_arrive(&shared.full[stage]);
    device::async_copy_arrive(&shared.full[stage]);
  }

  // Arrivals at a stage's barrier.
  FLASHMOE_DEVICE int arrivals() const { return shared.vectors() ? kThreads : 2 * kThreads; }

 private:
  using Lines = Depth<Element>;
  using Layout = RouterLayout<Element>;
  static constexpr int kWarps = kThreads / device::kWarpSize;
  static constexpr int kRows = (kStageDepth + kWarps - 1) / kWarps;
  static_assert(kThreads / 4 % kTileTokens == 0);

  FLASHMOE_DEVICE void copy_router(const RouterPosition& at, std::byte* stage) const {
    const LogitsBlock& block = shared.block;
    const int32_t num_experts = shared.arguments.num_experts;
    const int32_t depths = shared.arguments.hidden - at.depth;
    const int32_t experts = block.last_expert - block.first_expert;
    const int32_t columns = shared.layout.quads * kQuadColumns;
    const float* router =
        shared.arguments.router + int64_t{at.depth} * num_experts + block.first_expert;
    const int32_t lane = device::lane_index();
    if (shared.vectors()) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int32_t d = i * kWarps + device::warp_index();
        if (d >= kStageDepth) continue;
        const float* source = router + d * num_experts;
        std::byte* target = stage + Layout::router_offset(lane / 8, Lines::row(d), lane % 8);
#pragma unroll 1
        for (int32_t column = 4 * lane; column < columns; column += 128) {
          device::async_copy_16(target, source + column, d < depths && column < experts ? 16 : 0);
          target += 128 / kQuadColumns * Layout::kQuadBytes;
        }
      }
    } else {
#pragma unroll 1
      for (int32_t d = device::warp_index(); d < kStageDepth; d += kWarps) {
#pragma unroll 1
        for (int32_t column = lane; column < columns; column += device::kWarpSize) {
          float* chunk = reinterpret_cast<float*>(
              stage + Layout::router_offset(column / kQuadColumns, Lines::row(d),
                                            column % kQuadColumns / 4));
          const bool exists = d < depths && column < experts;
          chunk[column % 4] = exists ? router[d * num_experts + column] : 0.0f;
        }
      }
    }
  }

  FLASHMOE_DEVICE void copy_tokens(const RouterPosition& at, std::byte* stage) const {
    const Layout& layout = shared.layout;
    const int32_t hidden = shared.arguments.hidden;
    const int32_t thread_token = device::thread_index() / 4;
    const int32_t member = device::thread_index() % 4;
    const int32_t depth = member * Lines::kWidth;
    const int32_t tokens = shared.block.last_token - at.token;
    const int32_t full_tiles = (tokens + kTileTokens - 1) / kTileTokens;
    const int32_t tiles = full_tiles < layout.tiles ? full_tiles : layout.tiles;
    const Element* x =
        static_cast<const Element*>(shared.arguments.x) + int64_t{at.token} * hidden + at.depth;
    std::byte* target = stage + layout.token_offset(thread_token / kTileTokens, 0,
                                                    thread_token % kTileTokens, member);
#pragma unroll 1
    for (int32_t token = thread_token; token < tiles * kTileTokens; token += kThreads / 4) {
      const Element* source = x + (token * hidden + depth);
#pragma unroll
      for (int i = 0; i < Layout::kBlocks; ++i) {
        const bool exists = token < tokens && at.depth + depth + i * 4 * Lines::kWidth < hidden;
        device::async_copy_16(target + i * Layout::kBlockBytes, source + i * 4 * Lines::kWidth,
                              exists ? 16 : 0);
      }
      target += kThreads / 4 / kTileTokens * Layout::kTileBytes;
    }
  }
};

template <typename Element, int kMaxQuads>
FLASHMOE_DEVICE void store_logits(const RouterShared<Element>& shared, int32_t pass,
                                  const RouterSums<kMaxQuads>& sums) {
  const int first_quad = shared.first_quad();
  // This thread's first sum is that of `token` and `expert`; the pass begins with token `pass`.
  const int32_t token = pass + shared.tile() * kTileTokens + device::lane_index() / 4;
  const int32_t expert =
      shared.block.first_expert + first_quad * kQuadColumns + device::lane_index() % 4 * 8;
  const int32_t tokens = shared.block.last_token - token;
  const int32_t left = shared.block.last_expert - expert;
  const int32_t columns = shared.quads_from(first_quad) * kQuadColumns;
  const int32_t experts = left < columns ? left : columns;
  const int32_t num_experts = shared.arguments.num_experts;
  const bool vectors = shared.vectors();
  float* row = shared.arguments.logits + int64_t{token} * num_experts + expert;
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (16 * m + 8 * half < tokens) {
#pragma unroll
        for (int quad = 0; quad < kMaxQuads; ++quad) {
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            const int column = quad * kQuadColumns + 4 * part;
            const int i = 2 * half + part;
            const float (&v)[4][4] = sums.v[quad][m];
            const FourFloats four{{v[0][i], v[1][i], v[2][i], v[3][i]}};
            if (vectors && column < experts) {
              *reinterpret_cast<FourFloats*>(row + column) = four;
            } else if (!vectors) {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                if (column + j < experts) row[column + j] = four.v[j];
              }
            }
          }
        }
      }
      row += 8 * num_experts;
    }
  }
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
  auto& work = *reinterpret_cast<RouterShared<Element>*>(shared);
  static_assert(sizeof(work) <= kRouterStagesOffset);
  const RouterCopies<Element, kThreads> copies{work};
  if (device::thread_index() == 0) {
    const int quads = (last_expert - first_expert + kQuadColumns - 1) / kQuadColumns;
    work.arguments = arguments;
    work.block = {first_token, last_token, first_expert, last_expert};
    work.warps.choose(kWarps, kMaxQuads, last_token - first_token, quads);
    work.layout = {quads, work.warps.tiles};
    const int room = (static_cast<int>(shared_bytes) - kRouterStagesOffset) / work.layout.bytes();
    work.stages = room < kMaxRouterStages ? room : kMaxRouterStages;
    for (int i = 0; i < work.stages; ++i) device::mbarrier_init(&work.full[i], copies.arrivals());
    device::fence_mbarrier_init();
  }
  device::block_sync();

  RouterPosition copied{work.block.first_token};
  const auto copy_next = [&](int stage) {
    if (copied.token >= work.block.last_token) return;
    copies.copy(copied, stage);
    copied.advance(work.arguments.hidden, work.warps.tiles * kTileTokens);
  };
  for (int stage = 0; stage + 1 < work.stages; ++stage) copy_next(stage);

  const int tile = work.tile();
  const int first_quad = work.first_quad();
  int stage = 0;
  uint32_t parity = 0;
  for (int32_t pass = work.block.first_token; pass < work.block.last_token;
       pass += work.warps.tiles * kTileTokens) {
    const bool has_tile =
        tile < work.warps.tiles && pass + tile * kTileTokens < work.block.last_token;
    RouterSums<kMaxQuads> sums = {};
    for (int32_t depth = 0; depth < work.arguments.hidden; depth += kStageDepth) {
      // After a block_sync all have left the stage before this one: it can be filled again.
      const int previous = (stage == 0 ? work.stages : stage) - 1;
      if (work.stages == 1) {
        device::block_sync();
        copy_next(previous);
      }
      device::mbarrier_wait(&work.full[stage], parity);
      if (work.stages > 1) {
        device::block_sync();
        copy_next(previous);
      }
      if (has_tile) {
        multiply_stage(work.layout, work.stage(stage), tile, first_quad,
                       work.quads_from(first_quad), sums);
      }
      if (++stage == work.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
    if (has_tile) store_logits(work, pass, sums);
  }
  device::block_sync();
  if (device::thread_index() == 0) {
    for (int i = 0; i < work.stages; ++i) device::mbarrier_invalidate(&work.full[i]);
  }
  device::block_sync();
}

}  // namespace flashmoe::cuda
