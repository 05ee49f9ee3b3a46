// Step 5 of an epoch, the math warps' side: multiply, then finish a tile. The first stage ends with
// the activations in the workspace, the second with rows put where their tokens came from.
#pragma once

#include <cstdint>

#include "kernels/cuda/activation.h"
#include "kernels/cuda/tiles.h"
#include "kernels/cuda/vector.h"
#include "kernels/device/element.h"

namespace flashmoe::cuda {

// A warp's scratch to turn fragments, whose rows are 16 bytes wide, into longer pieces of rows. The
// padding keeps the rows in different banks.
template <typename Engine>
struct alignas(16) Staging {
  static constexpr int kRows = 16;
  static constexpr int kColumns = Engine::kChunkFragments * 8;
  static constexpr int kPadding = 16 / sizeof(typename Engine::Element);

  typename Engine::Element rows[kRows][kColumns + kPadding];
};

template <typename Engine, typename Transport>
struct MathRole {
  using Element = typename Engine::Element;
  using Fragments = float[Engine::kChunkFragments][4];

  Tiles<Engine, Transport> tiles;
  typename Engine::Shared& shared;
  TileRing& ring;
  Staging<Engine> (&staging)[Engine::kMathWarps];

  FLASHMOE_DEVICE void run() const {
    typename Engine::Consumer consumer;
    PipelinePosition<kTilesAhead> place;
    for (;;) {
      // Its place in shared memory is given back last, so that it takes no registers while they are
      // scarce. The producer is one tile ahead, at most.
      const TileWork& tile = await_tile(ring, place);
      if (tile.rows == 0) return;
      typename Engine::Accumulators sums;
      consumer.multiply(shared, tiles.depth(tile), sums);
      if (tile.kind == core::TileKind::kFirst) {
        finish_first(tile, sums);
      } else {
        finish_second(tile, sums);
      }
      give_back_tile(ring, place);
    }
  }

 private:
  // 0 to kMathWarps - 1.
  FLASHMOE_DEVICE static int math_warp() {
    return device::warp_index() - Engine::kCommWarps - Engine::kProducerWarps;
  }

  // Whether this lane stands for a row of the tile in the fragment that begins at `first_row`.
  FLASHMOE_DEVICE static bool has_row(const TileWork& tile, int first_row) {
    const int lane = device::lane_index();
    return lane < Staging<Engine>::kRows && first_row + lane < tile.rows;
  }

  // Adds a bias, a row of a [El][width] tensor, or nothing if there is none, to the sums of the
  // chunks `first`, `first` + `step`, ... of this warp. `column(c)` is the first result column of
  // chunk c.
  template <typename Column>
  FLASHMOE_DEVICE static void add_bias(const void* bias, const TileWork& tile, int32_t width,
                                       int first, int step, const Column& column,
                                       typename Engine::Accumulators& sums) {
    if (bias == nullptr) return;
    const Element* row = static_cast<const Element*>(bias) + int64_t{tile.expert} * width;
#pragma unroll
    for (int c = 0; c < Engine::kWarpChunks; ++c) {
      if (c % step != first) continue;
#pragma unroll
      for (int n = 0; n < Engine::kChunkFragments; ++n) {
        const int32_t at = column(c) + 8 * n + 2 * (device::lane_index() % 4);
        if (at >= width) continue;
        const float pair[2] = {device::to_float(row[at]), device::to_float(row[at + 1])};
#pragma unroll
        for (int m = 0; m < Engine::kRowFragments; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[m][c][n][i] += pair[i % 2];
        }
      }
    }
  }

  // Calls f(m, c, n, i) for every sum of the chunks `first`, `first` + 2, ...
  template <typename F>
  FLASHMOE_DEVICE static void for_every_second_chunk(int first, const F& f) {
#pragma unroll
    for (int m = 0; m < Engine::kRowFragments; ++m) {
#pragma unroll
      for (int c = 0; c < Engine::kWarpChunks; ++c) {
        if (c % 2 != first) continue;
#pragma unroll
        for (int n = 0; n < Engine::kChunkFragments; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) f(m, c, n, i);
        }
      }
    }
  }

  // The activation of every sum, but not of the up-projection's, which are in odd chunks.
  template <core::Activation kActivation>
  FLASHMOE_DEVICE static void activate_all(bool gated, typename Engine::Accumulators& sums) {
    const auto apply = [&](int m, int c, int n, int i) {
      sums[m][c][n][i] = activate(kActivation, sums[m][c][n][i]);
    };
    for_every_second_chunk(0, apply);
    if (!gated) for_every_second_chunk(1, apply);
  }

  // One branch for a tile: with one for each sum, the code of all the others lies between those
  // that are executed, and the kernel waits for instructions.
  FLASHMOE_DEVICE void activate_all(bool gated, typename Engine::Accumulators& sums) const {
    using core::Activation;
    switch (tiles.context.arguments.activation) {
      case Activation::kSilu:
        return activate_all<Activation::kSilu>(gated, sums);
      case Activation::kGelu:
        return activate_all<Activation::kGelu>(gated, sums);
      case Activation::kGeluTanh:
        return activate_all<Activation::kGeluTanh>(gated, sums);
      case Activation::kRelu:
        return activate_all<Activation::kRelu>(gated, sums);
      case Activation::kRelu2:
        return activate_all<Activation::kRelu2>(gated, sums);
    }
  }

  // Puts two neighbouring values into the staging rows.
  FLASHMOE_DEVICE void stage(int warp, int row, int column, float first, float second) const {
    struct alignas(2 * sizeof(Element)) Pair {
      Element values[2];
    };
    *reinterpret_cast<Pair*>(&staging[warp].rows[row][column]) =
        Pair{{device::from_float<Element>(first), device::from_float<Element>(second)}};
  }

  // Writes the staged rows, columns from `column` on of a tensor `width` wide; `target(i)` is the
  // start of staged row i, asked by all lanes together. Rows from tile.rows on are nobody's.
  template <typename Target>
  FLASHMOE_DEVICE void write_staged(int warp, const TileWork& tile, int32_t first_row,
                                    int32_t column, int32_t width, const Target& target) const {
    constexpr int kVectorsOfRow = Staging<Engine>::kColumns / kVectorElements<Element>;
    constexpr int kRowsAtOnce = device::kWarpSize / kVectorsOfRow;
    const int lane = device::lane_index();
    const int32_t offset = lane % kVectorsOfRow * kVectorElements<Element>;
    device::warp_sync();
#pragma unroll
    for (int r = 0; r < Staging<Engine>::kRows; r += kRowsAtOnce) {
      const int row = r + lane / kVectorsOfRow;
      Element* const start = target(row % Staging<Engine>::kRows);
      if (row < Staging<Engine>::kRows && first_row + row < tile.rows && column + offset < width) {
        *reinterpret_cast<Vector*>(start + column + offset) =
            *reinterpret_cast<const Vector*>(&staging[warp].rows[row][offset]);
      }
    }
    device::warp_sync();
  }

  // Puts a chunk's sums of 16 rows into the staging rows.
  FLASHMOE_DEVICE void stage_chunk(int warp, const Fragments& sums) const {
    const int lane = device::lane_index();
#pragma unroll
    for (int n = 0; n < Engine::kChunkFragments; ++n) {
      const int32_t column = 8 * n + 2 * (lane % 4);
      stage(warp, lane / 4, column, sums[n][0], sums[n][1]);
      stage(warp, lane / 4 + 8, column, sums[n][2], sums[n][3]);
    }
  }

  FLASHMOE_DEVICE void finish_first(const TileWork& tile,
                                    typename Engine::Accumulators& sums) const {
    const Context& context = tiles.context;
    const int32_t width = context.shape().intermediate;
    Element* activated = context.workspace<Element>(context.arguments.workspace.activated) +
                         int64_t{tile.block} * Engine::kBlockRows * width;
    const int warp = math_warp();
    const int lane = device::lane_index();
    const bool gated = tiles.gated();
    const int32_t begin = tile.column * tiles.first_stage_columns();
    const auto column = [&](int c) {
      const int chunk = Engine::chunk(warp, c);
      return begin + (gated ? chunk / 2 : chunk) * kChunkColumns + Engine::first_column(warp, c);
    };
    if (gated) {
      add_bias(context.pe.gate_bias, tile, width, 0, 2, column, sums);
      add_bias(context.pe.up_bias, tile, width, 1, 2, column, sums);
    } else {
      add_bias(context.pe.up_bias, tile, width, 0, 1, column, sums);
    }
    activate_all(gated, sums);
    if (gated) {
      for_every_second_chunk(
          0, [&](int m, int c, int n, int i) { sums[m][c][n][i] *= sums[m][c + 1][n][i]; });
    }
#pragma unroll
    for (int m = 0; m < Engine::kRowFragments; ++m) {
      const int first_row = Engine::first_row(warp, m);
      const auto target = [&](int row) { return activated + int64_t{first_row + row} * width; };
#pragma unroll
      for (int c = 0; c < Engine::kWarpChunks; ++c) {
        if (gated && c % 2 != 0) continue;  // done with its gate
        stage_chunk(warp, sums[m][c]);
        write_staged(warp, tile, first_row, column(c), width, target);
      }
    }
    // What this warp wrote comes before its signal.
    if (lane == 0) {
      device::fence<device::Scope::kGpu>();
      device::add_relaxed<device::Scope::kGpu>(context.first_done(tile.block), 1u);
    }
    device::warp_sync();
  }

  FLASHMOE_DEVICE void finish_second(const TileWork& tile,
                                     typename Engine::Accumulators& sums) const {
    const Context& context = tiles.context;
    const int32_t width = context.shape().hidden;
    const int32_t block_row = tile.block * Engine::kBlockRows;
    const core::Origin* origins =
        context.heap<core::Origin>(context.rank, context.arguments.heap.origin) + block_row;
    const int warp = math_warp();
    const int lane = device::lane_index();
    const auto column = [&](int c) {
      return tile.column * Engine::kColumns + Engine::chunk(warp, c) * kChunkColumns +
             Engine::first_column(warp, c);
    };
    add_bias(context.pe.down_bias, tile, width, 0, 1, column, sums);
    core::Origin origin[Engine::kRowFragments];  // in lane i: of row i of the fragment
#pragma unroll
    for (int m = 0; m < Engine::kRowFragments; ++m) {
      const int first_row = Engine::first_row(warp, m);
      origin[m] = core::Origin{0, 0};
      if (has_row(tile, first_row)) origin[m] = origins[first_row + lane];
      const auto target = [&](int row) {
        const core::Origin of_row{device::shuffle(origin[m].pe, row),
                                  device::shuffle(origin[m].slot, row)};
        return reinterpret_cast<Element*>(
            Transport::result(context, of_row, block_row + first_row + row));
      };
#pragma unroll
      for (int c = 0; c < Engine::kWarpChunks; ++c) {
        stage_chunk(warp, sums[m][c]);
        write_staged(warp, tile, first_row, column(c), width, target);
      }
    }
    // One fence for all rows of the warp, then one signal for each.
    context.fence_before_signal();
#pragma unroll
    for (int m = 0; m < Engine::kRowFragments; ++m) {
      if (!has_row(tile, Engine::first_row(warp, m))) continue;
      if (!Transport::reaches(context, origin[m].pe)) continue;
      const int32_t token = origin[m].slot / context.shape().experts_per_token;
      device::add_relaxed<device::Scope::kSystem>(context.came_back(origin[m].pe, token),
                                                  uint64_t{1});
    }
    if constexpr (Transport::kNetwork) {
      static_assert(kRowsOfPart == 16);
#pragma unroll
      for (int m = 0; m < Engine::kRowFragments; ++m) {
        const int32_t row = block_row + Engine::first_row(warp, m);
        if (lane == 0) {
          device::add_relaxed<device::Scope::kGpu>(
              Transport::second_done(context, row / kRowsOfPart), 1u);
        }
      }
    }
  }
};

}  // namespace flashmoe::cuda
