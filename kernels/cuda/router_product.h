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

// A warp loads 32 bytes of each token at once, and of every 16 bytes a thread gets the 4 at 4 *
// member. The router's rows lie in shared memory in the order in which the products take them.
template <typename Element>
struct Depth {
  static constexpr int kWidth = 16 / sizeof(Element);  // elements of 16 bytes
  static constexpr int kLoad = 2 * kWidth;             // of the 32 bytes
  static constexpr int kRows = kLoad / 4;              // of the router, that a thread has of them

  // Where the router's row of depth `d` of a stage lies; 4 rows, one of each thread, are together.
  static FLASHMOE_DEVICE uint32_t row(uint32_t d) {
    return sizeof(Element) == 4 ? d : d / 8 * 8 + d % 2 * 4 + d % 8 / 2;
  }
};

// A stage in shared memory: the router's quads, [kStageDepth][kQuadColumns] each, then the tiles of
// tokens, [kBlocks][kTileTokens][64 bytes] each. A warp reads 4 rows of a quad, and 8 tokens of a
// block, at once, so their 16-byte chunks are swizzled to lie in different banks.
template <typename Element>
struct RouterLayout {
  static constexpr int kBlocks = kStageDepth * sizeof(Element) / 64;
  static constexpr int kQuadBytes = kStageDepth * kQuadColumns * sizeof(float);
  static constexpr int kBlockBytes = kTileTokens * 64;
  static constexpr int kTileBytes = kBlocks * kBlockBytes;

  int quads;
  int tiles;

  FLASHMOE_DEVICE int bytes() const { return quads * kQuadBytes + tiles * kTileBytes; }
  // Columns 4 * chunk + [0, 4) of a quad.
  static FLASHMOE_DEVICE uint32_t router_offset(uint32_t quad, uint32_t row, uint32_t chunk) {
    return quad * kQuadBytes + row * 128 + (chunk ^ (row % 4 * 2)) * 16;
  }
  // Bytes 16 * chunk + [0, 16) of a token's 64.
  FLASHMOE_DEVICE uint32_t token_offset(uint32_t tile, uint32_t block, uint32_t token,
                                        uint32_t chunk) const {
    return quads * kQuadBytes + tile * kTileBytes + block * kBlockBytes + token * 64 +
           (chunk ^ (token / 2 % 4)) * 16;
  }
};

// The sums of a thread: of columns 4 * n + j of a quad, n the column of the tensor core's fragment
// i is of (kernels/device/mma.h).
template <int kMaxQuads>
struct RouterSums {
  float v[kMaxQuads][kFragments][4][4];
};

// high + low is x but for its last bit, where both are read as tf32.
FLASHMOE_DEVICE void split(float x, uint32_t& high, uint32_t& low) {
  high = (device::float_bits(x) + 0x1000u) & ~0x1fffu;
  low = device::float_bits(x - device::float_of_bits(high));
}

// The products of 8 depths of x, whose parts are tf32. `rows` are the router's two rows.
template <bool kTwoParts>
FLASHMOE_DEVICE void multiply_tf32(const uint32_t (&a)[kFragments][4],
                                   const uint32_t (&a_low)[kFragments][4], const FourFloats* rows,
                                   float (&sums)[kFragments][4][4]) {
  uint32_t high[4][2];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t low[2];
    split(rows[0].v[j], high[j][0], low[0]);
    split(rows[1].v[j], high[j][1], low[1]);
#pragma unroll
    for (int m = 0; m < kFragments; ++m) device::mma<float>(sums[m][j], a[m], low);
  }
  if constexpr (kTwoParts) {
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

// The products of the depths that a warp loads at once: `tokens` as load_matrices brings them,
// `rows` the router's.
FLASHMOE_DEVICE void multiply(core::Float16, const uint32_t (&tokens)[kFragments][4],
                              FourFloats (&rows)[4], float (&sums)[kFragments][4][4]) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t a[kFragments][4];
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = tokens[m][2 * step + i % 2] >> (i / 2 * 16);
        a[m][i] = device::float_bits(device::to_float(core::Float16{static_cast<uint16_t>(word)}));
      }
    }
    multiply_tf32<false>(a, a, &rows[2 * step], sums);
  }
}

FLASHMOE_DEVICE void multiply(float, const uint32_t (&tokens)[kFragments][4], FourFloats (&rows)[2],
                              float (&sums)[kFragments][4][4]) {
  uint32_t a[kFragments][4];
  uint32_t a_low[kFragments][4];
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      split(device::float_of_bits(tokens[m][i]), a[m][i], a_low[m][i]);
    }
  }
  multiply_tf32<true>(a, a_low, rows, sums);
}

// Takes the leading 8 bits of x and y as a pair of BFloat16, and leaves the rest.
FLASHMOE_DEVICE uint32_t take_bfloat16(float& x, float& y) {
  const uint32_t x_bits = device::float_bits(x) & 0xffff0000u;
  const uint32_t y_bits = device::float_bits(y) & 0xffff0000u;
  x -= device::float_of_bits(x_bits);
  y -= device::float_of_bits(y_bits);
  return x_bits >> 16 | y_bits;
}

FLASHMOE_DEVICE void multiply(core::BFloat16, const uint32_t (&tokens)[kFragments][4],
                              FourFloats (&rows)[4], float (&sums)[kFragments][4][4]) {
  constexpr int kParts = 3;
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
          device::mma<core::BFloat16>(sums[m][first + j], tokens[m], parts[part][j]);
        }
      }
    }
  }
}

// Adds a stage's products of one tile of tokens and `quads` quads of columns. The products of 64
// bytes of each token are summed apart, as the tensor cores cut what does not fit a sum instead of
// rounding it.
template <typename Element, int kMaxQuads>
FLASHMOE_DEVICE void multiply_stage(const RouterLayout<Element>& layout, const std::byte* stage,
                                    int tile, int first_quad, int quads,
                                    RouterSums<kMaxQuads>& sums) {
  using Lines = Depth<Element>;
  const int lane = device::lane_index();
  const int group = lane / 4;
  const int member = lane % 4;
// Unrolled loops would keep more loads in flight than there are registers for.
#pragma unroll 1
  for (int block = 0; block < RouterLayout<Element>::kBlocks; ++block) {
#pragma unroll
    for (int quad = 0; quad < kMaxQuads; ++quad) {
      if (quad < quads) {
        float block_sums[kFragments][4][4] = {};
#pragma unroll 1
        for (int load = 0; load < 2; ++load) {
          uint32_t tokens[kFragments][4];
#pragma unroll
          for (int m = 0; m < kFragments; ++m) {
            device::load_matrices<false>(
                tokens[m],
                stage + layout.token_offset(tile, block, 16 * m + lane % 16, 2 * load + lane / 16));
          }
          FourFloats rows[Lines::kRows];
#pragma unroll
          for (int i = 0; i < Lines::kRows; ++i) {
            const int row = (2 * block + load) * Lines::kLoad + 4 * i + member;
            rows[i] = *reinterpret_cast<const FourFloats*>(
                stage + layout.router_offset(first_quad + quad, row, group));
          }
          multiply(Element{}, tokens, rows, block_sums);
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
