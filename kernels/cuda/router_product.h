// One warp's products of a stage of the router: tokens times columns over kStageDepth. The choice
// of experts is discontinuous in the logits, so no factor is rounded: the router's float is a sum
// of numbers that the tensor cores take, each of which makes a product with x. These are three
// bfloat16 where x is bfloat16, else two tf32, which lack its last bit; a 16-bit x is a tf32, and a
// float x is two as well.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/core/types.h"
#include "kernels/device/element.h"
#include "kernels/device/identity.h"
#include "kernels/device/mma.h"

namespace flashmoe::cuda::internal {

inline constexpr int kStageDepth = 32;
inline constexpr int kFragments = 2;  // of 16 tokens, which share the parts of the router
inline constexpr int kTileTokens = 16 * kFragments;
inline constexpr int kQuadColumns = 32;  // one 16-byte load is of 4 products of 8 columns

struct alignas(16) FourFloats {
  float v[4];
};
struct alignas(16) FourWords {
  uint32_t v[4];
};

// A thread reads 16 bytes of a token at a time and uses them as they come: of the depths of a stage
// it has those at kWidth * member + [0, kWidth) of each block, and a product takes the next ones
// from each thread. The router's rows lie in shared memory in that order.
template <typename Element>
struct Depth {
  static constexpr int kWidth = 16 / sizeof(Element);  // elements of 16 bytes
  static constexpr int kBlock = 4 * kWidth;            // depths that 4 threads read at once
  static constexpr int kBlocks = kStageDepth / kBlock;
  static constexpr int kSteps = kWidth / 2;  // of 8 depths, two of each thread

  // Where the router's row of depth `d` of a stage lies; 4 rows, one of each thread, are together.
  static FLASHMOE_DEVICE uint32_t row(uint32_t d) {
    const uint32_t member = d % kBlock / kWidth;
    const uint32_t step = d / kBlock * kSteps + d % kWidth / 2;
    return 8 * step + 4 * (d % 2) + member;
  }
};

// A stage in shared memory: the router's quads, [kStageDepth][kQuadColumns] each, then the tiles of
// tokens, [kBlocks][kTileTokens][64 bytes] each. A warp reads 4 rows of a quad at once, so their
// 16-byte chunks are swizzled to lie in different banks.
template <typename Element>
struct RouterLayout {
  static constexpr int kQuadBytes = kStageDepth * kQuadColumns * sizeof(float);
  static constexpr int kBlockBytes = kTileTokens * 64;
  static constexpr int kTileBytes = Depth<Element>::kBlocks * kBlockBytes;

  int quads;
  int tiles;

  FLASHMOE_DEVICE int bytes() const { return quads * kQuadBytes + tiles * kTileBytes; }
  // Columns 4 * chunk + [0, 4) of a quad.
  static FLASHMOE_DEVICE uint32_t router_offset(uint32_t quad, uint32_t row, uint32_t chunk) {
    return quad * kQuadBytes + row * 128 + (chunk ^ (row % 4 * 2)) * 16;
  }
  // The 16 bytes of a token that thread `member` of a group reads.
  FLASHMOE_DEVICE uint32_t token_offset(uint32_t tile, uint32_t block, uint32_t token,
                                        uint32_t member) const {
    return quads * kQuadBytes + tile * kTileBytes + block * kBlockBytes + token * 64 + member * 16;
  }
};

// The sums of a thread: [quad][fragment][j][i] as for_each_result says.
template <int kMaxQuads>
struct RouterSums {
  float v[kMaxQuads][kFragments][4][4];
};

// Calls f(quad, token of the tile, column of the quad, sums of 4 columns) for all of this thread's.
template <int kMaxQuads, typename F>
FLASHMOE_DEVICE void for_each_result(const RouterSums<kMaxQuads>& sums, int quads, const F& f) {
  const int group = device::lane_index() / 4;
  const int member = device::lane_index() % 4;
#pragma unroll
  for (int quad = 0; quad < kMaxQuads; ++quad) {
    if (quad < quads) {
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&v)[4][4] = sums.v[quad][m];
          f(quad, 16 * m + group + i / 2 * 8, member * 8 + i % 2 * 4,
            FourFloats{{v[0][i], v[1][i], v[2][i], v[3][i]}});
        }
      }
    }
  }
}

// high + low is x but for its last bit, where both are read as tf32.
FLASHMOE_DEVICE void split(float x, uint32_t& high, uint32_t& low) {
  high = (device::float_bits(x) + 0x1000u) & ~0x1fffu;
  low = device::float_bits(x - device::float_of_bits(high));
}

// The products of a step of 8 depths of x as a float or Float16. `tokens` are this thread's words
// of rows group + 8 i, `rows` the router's two rows.
template <typename Element>
FLASHMOE_DEVICE void multiply_step(const FourWords (&tokens)[2 * kFragments], int step,
                                   const FourFloats (&rows)[2], float (&sums)[kFragments][4][4]) {
  constexpr bool kFloat = std::is_same_v<Element, float>;
  uint32_t a[kFragments][4];
  uint32_t a_low[kFragments][4];
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const FourWords& token = tokens[2 * m + i % 2];
      if constexpr (kFloat) {
        split(device::float_of_bits(token.v[2 * step + i / 2]), a[m][i], a_low[m][i]);
      } else {
        const uint32_t word = token.v[step] >> (i / 2 * 16);
        a[m][i] = device::float_bits(device::to_float(Element{static_cast<uint16_t>(word)}));
      }
    }
  }
  uint32_t high[4][2];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t low[2];
    split(rows[0].v[j], high[j][0], low[0]);
    split(rows[1].v[j], high[j][1], low[1]);
#pragma unroll
    for (int m = 0; m < kFragments; ++m) device::mma<float>(sums[m][j], a[m], low);
  }
  if constexpr (kFloat) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int m = 0; m < kFragments; ++m) device::mma<float>(sums[m][j], a_low[m], high[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int m = 0; m < kFragments; ++m) device::mma<float>(sums[m][j], a[m], high[j]);
  }
}

// Takes the leading 8 bits of x and y as a pair of BFloat16, and leaves the rest.
FLASHMOE_DEVICE uint32_t take_bfloat16(float& x, float& y) {
  const uint32_t x_bits = device::float_bits(x) & 0xffff0000u;
  const uint32_t y_bits = device::float_bits(y) & 0xffff0000u;
  x -= device::float_of_bits(x_bits);
  y -= device::float_of_bits(y_bits);
  return x_bits >> 16 | y_bits;
}

// The products of two steps of x as a BFloat16.
FLASHMOE_DEVICE void multiply_steps(const FourWords (&tokens)[2 * kFragments], int step,
                                    FourFloats (&rows)[4], float (&sums)[kFragments][4][4]) {
  constexpr int kParts = 3;
  uint32_t a[kFragments][4];
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[m][i] = tokens[2 * m + i % 2].v[step + i / 2];
  }
  // Two columns at a time: enough products that do not wait for one another, in few registers.
#pragma unroll
  for (int first = 0; first < 4; first += 2) {
    uint32_t parts[kParts][2][2];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          parts[part][j][i] = take_bfloat16(rows[2 * i].v[first + j], rows[2 * i + 1].v[first + j]);
        }
      }
    }
#pragma unroll
    for (int part = kParts - 1; part >= 0; --part) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
          device::mma<core::BFloat16>(sums[m][first + j], a[m], parts[part][j]);
        }
      }
    }
  }
}

// Adds a stage's products of one tile of tokens and `quads` quads of columns. A block's products
// are summed apart, as the tensor cores cut what does not fit a sum instead of rounding it.
template <typename Element, int kMaxQuads>
FLASHMOE_DEVICE void multiply_stage(const RouterLayout<Element>& layout, const std::byte* stage,
                                    int tile, int first_quad, int quads,
                                    RouterSums<kMaxQuads>& sums) {
  using Lines = Depth<Element>;
  constexpr int kStepsAtOnce = std::is_same_v<Element, core::BFloat16> ? 2 : 1;
  const int group = device::lane_index() / 4;
  const int member = device::lane_index() % 4;
#pragma unroll
  for (int block = 0; block < Lines::kBlocks; ++block) {
    FourWords tokens[2 * kFragments];
#pragma unroll
    for (int i = 0; i < 2 * kFragments; ++i) {
      tokens[i] = *reinterpret_cast<const FourWords*>(
          stage + layout.token_offset(tile, block, group + 8 * i, member));
    }
#pragma unroll
    for (int quad = 0; quad < kMaxQuads; ++quad) {
      if (quad < quads) {
        float block_sums[kFragments][4][4] = {};
#pragma unroll
        for (int step = 0; step < Lines::kSteps; step += kStepsAtOnce) {
          FourFloats rows[2 * kStepsAtOnce];
#pragma unroll
          for (int i = 0; i < 2 * kStepsAtOnce; ++i) {
            const int row = 8 * (block * Lines::kSteps + step) + 4 * i + member;
            rows[i] = *reinterpret_cast<const FourFloats*>(
                stage + layout.router_offset(first_quad + quad, row, group));
          }
          if constexpr (kStepsAtOnce == 2) {
            multiply_steps(tokens, step, rows, block_sums);
          } else {
            multiply_step<Element>(tokens, step, rows, block_sums);
          }
        }
#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums.v[quad][m][j][i] += block_sums[m][j][i];
          }
        }
      }
    }
  }
}

}  // namespace flashmoe::cuda::internal
