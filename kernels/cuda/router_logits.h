// The router's products: logits [T][E] = x [T][H] router [H][E], accurate to float32. The choice of
// experts is discontinuous in them, so no factor is rounded: a 16-bit x is a tf32, and a float is
// the sum of two but for its last bit, which makes two products, or three where x is a float too.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/core/types.h"
#include "kernels/device/async_copy.h"
#include "kernels/device/barrier.h"
#include "kernels/device/element.h"
#include "kernels/device/identity.h"
#include "kernels/device/mbarrier.h"
#include "kernels/device/mma.h"

namespace flashmoe::cuda {

struct LogitsArguments {
  const void* x;        // [tokens][hidden] elements; hidden is a multiple of 16 bytes of them
  const float* router;  // [hidden][num_experts]
  float* logits;        // [tokens][num_experts]
  int32_t hidden;
  int32_t num_experts;
};

namespace internal {

// Depth of a stage; rows of a product (mma's); columns that one 16-byte load feeds to 4 products.
inline constexpr int kStageDepth = 32;
inline constexpr int kTileTokens = 16;
inline constexpr int kQuadColumns = 32;
inline constexpr int kMaxQuads = 2;   // of a warp: 64 accumulators in a thread
inline constexpr int kMaxStages = 6;  // copies of 5 stages are in flight; more would not be faster
inline constexpr int kStagesOffset = 128;

struct alignas(16) FourFloats {
  float v[4];
};
struct alignas(16) FourWords {
  uint32_t v[4];
};

// A thread reads 16 bytes of a token at a time and uses them as they come: of the depths of a stage
// it has those at kWidth * member + [0, kWidth) of each block, two for each product. The router's
// rows lie in shared memory in that order.
template <typename Element>
struct Depth {
  static constexpr int kWidth = 16 / sizeof(Element);  // elements of a vector
  static constexpr int kBlock = 4 * kWidth;            // depths that 4 threads read at once
  static constexpr int kBlocks = kStageDepth / kBlock;
  static constexpr int kSteps = kWidth / 2;  // products of a block

  // Where the row of depth `d` of a stage lies.
  static FLASHMOE_DEVICE int row(int d) {
    const int member = d % kBlock / kWidth;
    const int step = d / kBlock * kSteps + d % kWidth / 2;
    return 8 * step + 4 * (d % 2) + member;
  }
};

// high + low is x but for its last bit, where both are read as tf32.
FLASHMOE_DEVICE void split(float x, uint32_t& high, uint32_t& low) {
  high = (device::float_bits(x) + 0x1000u) & ~0x1fffu;
  low = device::float_bits(x - device::float_of_bits(high));
}

// What the warps of a CTA compute at once: `tiles` tiles of tokens, each by `parts` warps that have
// `quads` quads of columns. The order of a logit's sums does not depend on it.
struct WarpLayout {
  int quads;
  int parts;
  int tiles;

  static FLASHMOE_DEVICE WarpLayout of(int warps, int tokens, int all_quads) {
    const int token_tiles = (tokens + kTileTokens - 1) / kTileTokens;
    int parts = token_tiles < warps ? warps / token_tiles : 1;
    const int fewest = (all_quads + kMaxQuads - 1) / kMaxQuads;
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

// A stage in shared memory: the router's quads, [kStageDepth][kQuadColumns] each, then the tiles of
// tokens, [kBlocks][kTileTokens][64 bytes] each. A product reads 4 rows of a quad at once, so their
// 16-byte chunks are swizzled to lie in different banks.
template <typename Element>
struct StageLayout {
  static constexpr int kQuadBytes = kStageDepth * kQuadColumns * sizeof(float);
  static constexpr int kTileBytes = kStageDepth * kTileTokens * sizeof(Element);

  int quads;
  int tiles;

  FLASHMOE_DEVICE int bytes() const { return quads * kQuadBytes + tiles * kTileBytes; }
  // Columns 4 * chunk + [0, 4) of a quad.
  static FLASHMOE_DEVICE std::byte* router(std::byte* stage, int quad, int row, int chunk) {
    return stage + quad * kQuadBytes + row * 128 + (chunk ^ (row % 4 * 2)) * 16;
  }
  // The 16 bytes of a token that thread `member` of a group reads.
  FLASHMOE_DEVICE std::byte* tokens(std::byte* stage, int tile, int block, int token,
                                    int member) const {
    return stage + quads * kQuadBytes + tile * kTileBytes + (block * kTileTokens + token) * 64 +
           member * 16;
  }
};

// One walk over the stages of all passes over the tokens: by the copies, and behind them by the
// products.
struct Walk {
  int stage = 0;
  uint32_t parity = 0;
  int depth = 0;
  int32_t token;  // the first of the pass

  FLASHMOE_DEVICE void next(int stages, int hidden, int pass_tokens) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
    depth += kStageDepth;
    if (depth >= hidden) {
      depth = 0;
      token += pass_tokens;
    }
  }
};

// Fills a stage from depth and token on. What lies outside of the tensors becomes 0.
template <typename Element, int kThreads>
FLASHMOE_DEVICE void copy_stage(const LogitsArguments& arguments, const Walk& at,
                                int32_t last_token, int32_t first_expert, int32_t last_expert,
                                const StageLayout<Element>& layout, std::byte* stage,
                                device::Mbarrier* full) {
  using Lines = Depth<Element>;
  constexpr int kWarps = kThreads / device::kWarpSize;
  const int lane = device::lane_index();
  const int experts = last_expert - first_expert;
  const int columns = layout.quads * kQuadColumns;
  const int depths = arguments.hidden - at.depth;
  const bool aligned = arguments.num_experts % 4 == 0;
  const float* source = arguments.router + int64_t{at.depth} * arguments.num_experts + first_expert;
#pragma unroll
  for (int i = 0; i < (kStageDepth + kWarps - 1) / kWarps; ++i) {
    const int d = i * kWarps + device::warp_index();
    if (d >= kStageDepth) break;
    const int32_t offset = d * arguments.num_experts;
    if (aligned) {
      for (int column = 4 * lane; column < columns; column += 4 * device::kWarpSize) {
        device::async_copy_16(layout.router(stage, column / kQuadColumns, Lines::row(d), lane % 8),
                              source + (offset + column), d < depths && column < experts ? 16 : 0);
      }
    } else {
      for (int column = lane; column < columns; column += device::kWarpSize) {
        float* chunk = reinterpret_cast<float*>(
            layout.router(stage, column / kQuadColumns, Lines::row(d), lane / 4));
        chunk[lane % 4] = d < depths && column < experts ? source[offset + column] : 0.0f;
      }
    }
  }
  const int first = device::thread_index() / 4;
  const int member = device::thread_index() % 4;
  const int depth = member * Lines::kWidth;
  const Element* token = static_cast<const Element*>(arguments.x) +
                         int64_t{at.token + first} * arguments.hidden + (at.depth + depth);
  const int tokens = last_token - at.token;
  const int tokens_of_tiles = (tokens + kTileTokens - 1) / kTileTokens * kTileTokens;
  const int rows =
      tokens_of_tiles < layout.tiles * kTileTokens ? tokens_of_tiles : layout.tiles * kTileTokens;
  for (int row = first; row < rows; row += kThreads / 4) {
#pragma unroll
    for (int block = 0; block < Lines::kBlocks; ++block) {
      const bool exists = row < tokens && depth + block * Lines::kBlock < depths;
      device::async_copy_16(
          layout.tokens(stage, row / kTileTokens, block, row % kTileTokens, member),
          token + block * Lines::kBlock, exists ? 16 : 0);
    }
    token += int64_t{kThreads / 4} * arguments.hidden;
  }
  if (!aligned) device::mbarrier_arrive(full);
  device::async_copy_arrive(full);
}

// Adds a stage's products of one tile of tokens and up to kMaxQuads quads of columns. Thread
// (group, member) has the columns 32 quad + 8 member + [0, 8) of tokens group and group + 8: those
// of accumulators[quad][j] are j, j + 4, and again for the second token. A block's products are
// summed apart, as the tensor cores cut what does not fit the sum instead of rounding it.
template <typename Element>
FLASHMOE_DEVICE void multiply_stage(const StageLayout<Element>& layout, std::byte* stage, int tile,
                                    int first_quad, int quads,
                                    float (&accumulators)[kMaxQuads][4][4]) {
  using Lines = Depth<Element>;
  const int group = device::lane_index() / 4;
  const int member = device::lane_index() % 4;
#pragma unroll
  for (int block = 0; block < Lines::kBlocks; ++block) {
    const FourWords words[2] = {
        *reinterpret_cast<const FourWords*>(layout.tokens(stage, tile, block, group, member)),
        *reinterpret_cast<const FourWords*>(layout.tokens(stage, tile, block, group + 8, member))};
#pragma unroll
    for (int quad = 0; quad < kMaxQuads; ++quad) {
      if (quad < quads) {
        float sums[4][4] = {};
#pragma unroll
        for (int step = 0; step < Lines::kSteps; ++step) {
          uint32_t a[4];
          uint32_t a_low[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if constexpr (sizeof(Element) == 4) {
              split(device::float_of_bits(words[i % 2].v[2 * step + i / 2]), a[i], a_low[i]);
            } else {
              const uint32_t word = words[i % 2].v[step];
              const Element element{static_cast<uint16_t>(i / 2 == 0 ? word : word >> 16)};
              a[i] = device::float_bits(device::to_float(element));
            }
          }
          FourFloats weights[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int row = 8 * (block * Lines::kSteps + step) + 4 * i + member;
            weights[i] = *reinterpret_cast<const FourFloats*>(
                layout.router(stage, first_quad + quad, row, group));
          }
          uint32_t high[4][2];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            uint32_t low[2];
            split(weights[0].v[j], high[j][0], low[0]);
            split(weights[1].v[j], high[j][1], low[1]);
            device::mma<float>(sums[j], a, low);
          }
          if constexpr (sizeof(Element) == 4) {
#pragma unroll
            for (int j = 0; j < 4; ++j) device::mma<float>(sums[j], a_low, high[j]);
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) device::mma<float>(sums[j], a, high[j]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) accumulators[quad][j][i] += sums[j][i];
        }
      }
    }
  }
}

FLASHMOE_DEVICE void store_logits(const LogitsArguments& arguments, int32_t first_token,
                                  int32_t last_token, int32_t first_expert, int32_t last_expert,
                                  int quads, float (&accumulators)[kMaxQuads][4][4]) {
  const bool aligned = arguments.num_experts % 4 == 0;
#pragma unroll
  for (int quad = 0; quad < kMaxQuads; ++quad) {
    if (quad < quads) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t token = first_token + device::lane_index() / 4 + i / 2 * 8;
        const int32_t expert =
            first_expert + quad * kQuadColumns + device::lane_index() % 4 * 8 + i % 2 * 4;
        if (token >= last_token) continue;
        float* target = arguments.logits + int64_t{token} * arguments.num_experts + expert;
        if (aligned && expert < last_expert) {
          *reinterpret_cast<FourFloats*>(target) = {
              accumulators[quad][0][i], accumulators[quad][1][i], accumulators[quad][2][i],
              accumulators[quad][3][i]};
        } else if (!aligned) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (expert + j < last_expert) target[j] = accumulators[quad][j][i];
          }
        }
      }
    }
  }
}
}  // namespace internal

// The logits of tokens [first_token, last_token) for experts [first_expert, last_expert), the
// first of which is a multiple of 4, and so is the last unless it is num_experts. By all threads of
// the CTA, with all of its dynamic shared memory; both are free again when it returns, and the
// CTA's threads see the logits. A logit's bits depend on its token, its expert and nothing else.
template <typename Element, int kThreads>
FLASHMOE_DEVICE void router_logits(const LogitsArguments& arguments, int32_t first_token,
                                   int32_t last_token, int32_t first_expert, int32_t last_expert,
                                   std::byte* shared, size_t shared_bytes) {
  using namespace internal;
  if (first_token >= last_token || first_expert >= last_expert) return;
  const int all_quads = (last_expert - first_expert + kQuadColumns - 1) / kQuadColumns;
  const WarpLayout warps =
      WarpLayout::of(kThreads / device::kWarpSize, last_token - first_token, all_quads);
  const int pass_tokens = warps.tiles * kTileTokens;
  const StageLayout<Element> layout{all_quads, warps.tiles};
  const int room = (static_cast<int>(shared_bytes) - kStagesOffset) / layout.bytes();
  const int stages = room < kMaxStages ? room : kMaxStages;
  device::Mbarrier* full = reinterpret_cast<device::Mbarrier*>(shared);
  std::byte* first_stage = shared + kStagesOffset;

  if (device::thread_index() == 0) {
    const bool plain_stores = arguments.num_experts % 4 != 0;
    for (int i = 0; i < stages; ++i) {
      device::mbarrier_init(&full[i], plain_stores ? 2 * kThreads : kThreads);
    }
    device::fence_mbarrier_init();
  }
  device::block_sync();

  Walk copies{.token = first_token};
  const auto copy_next = [&] {
    if (copies.token >= last_token) return;
    copy_stage<Element, kThreads>(arguments, copies, last_token, first_expert, last_expert, layout,
                                  first_stage + copies.stage * layout.bytes(), &full[copies.stage]);
    copies.next(stages, arguments.hidden, pass_tokens);
  };
  for (int i = 0; i + 1 < stages; ++i) copy_next();

  const int part = device::warp_index() % warps.parts;
  const int tile = device::warp_index() / warps.parts;
  const int first_quad = part * warps.quads;
  const int quads_left = all_quads - first_quad;
  const int quads = quads_left < warps.quads ? quads_left : warps.quads;
  float accumulators[kMaxQuads][4][4] = {};
  for (Walk walk{.token = first_token}; walk.token < last_token;) {
    const int32_t token = walk.token + tile * kTileTokens;
    const bool has_work = tile < warps.tiles && token < last_token;
    device::mbarrier_wait(&full[walk.stage], walk.parity);
    device::block_sync();  // all have left the stage before this one: it can be filled again
    copy_next();
    if (has_work) {
      multiply_stage<Element>(layout, first_stage + walk.stage * layout.bytes(), tile, first_quad,
                              quads, accumulators);
    }
    walk.next(stages, arguments.hidden, pass_tokens);
    if (walk.depth == 0 && has_work) {
      store_logits(arguments, token, last_token, first_expert + first_quad * kQuadColumns,
                   last_expert, quads, accumulators);
#pragma unroll
      for (auto& quad : accumulators) {
#pragma unroll
        for (auto& column : quad) {
#pragma unroll
          for (float& value : column) value = 0.0f;
        }
      }
    }
  }
  device::block_sync();
}

}  // namespace flashmoe::cuda
