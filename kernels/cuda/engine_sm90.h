// The tile engine of Hopper: TMA brings rows and weights to shared memory, wgmma multiplies them
// from there. One producer warp, two math warpgroups.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/core/host_device.h"
#include "kernels/core/types.h"
#include "kernels/cuda/pipeline.h"
#include "kernels/cuda/product.h"
#include "kernels/device/barrier.h"
#include "kernels/device/identity.h"
#include "kernels/device/mbarrier.h"
#include "kernels/device/tma.h"
#include "kernels/device/warp.h"
#include "kernels/device/wgmma.h"

namespace flashmoe::cuda {

// kBlockRows is 128, each math warpgroup has 64 rows of all chunks, or 64, each math warpgroup has
// all rows of half of the chunks.
template <typename Element_, int kBlockRows_>
struct Sm90Engine {
  using Element = Element_;
  static_assert(std::is_same_v<Element, core::BFloat16> || std::is_same_v<Element, core::Float16>);
  static_assert(kBlockRows_ == 128 || kBlockRows_ == 64);

  // Whether products have the error of float, or of a 16-bit element type.
  static constexpr bool kExact = true;
  // Whether rows and weights are described by PeArguments::maps.
  static constexpr bool kTensorMaps = true;
  static constexpr int kSharedLimit = 227 * 1024;  // bytes that a CTA may have on 9.0

  static constexpr int kBlockRows = kBlockRows_;
  static constexpr int kChunks = 4;
  static constexpr int kColumns = kChunks * kChunkColumns;
  static constexpr int kStageDepth = 64;
  static constexpr int kStages = 4;

  static constexpr int kCommWarps = 3;
  static constexpr int kProducerWarps = 1;
  static constexpr int kMathWarps = 8;
  // Whether registers can be moved to the math warps.
  static constexpr bool kMovesRegisters = true;
  static constexpr int kThreads = (kCommWarps + kProducerWarps + kMathWarps) * device::kWarpSize;

  // What one TMA copy takes; tensors are (depth, row, 0) and (column, depth, expert).
  static constexpr TensorBox kRowsBox{kStageDepth, kBlockRows, 1};
  static constexpr TensorBox kWeightsBox{kChunkColumns, kStageDepth, 1};

  struct Stage {
    Element rows[kBlockRows][kStageDepth];
    Element weights[kChunks][kStageDepth][kChunkColumns];
  };
  struct Shared {
    alignas(1024) Stage stages[kStages];
    device::Mbarrier full[kStages];   // one arrival, and the bytes of a stage
    device::Mbarrier empty[kStages];  // one arrival of each math warp
  };

  // Accumulators of a math thread: m16n8 fragments (pipeline.h).
  static constexpr int kRowFragments = 1;
  static constexpr int kWarpChunks = kBlockRows == 128 ? kChunks : kChunks / 2;
  static constexpr int kChunkFragments = kChunkColumns / 8;
  using Accumulators = float[kRowFragments][kWarpChunks][kChunkFragments][4];

  // Of math warp 0 to kMathWarps - 1: the first row of its fragments, its chunks, and the first
  // column of its fragments inside a chunk.
  FLASHMOE_HOST_DEVICE static constexpr int first_row(int warp, int fragment) {
    return (kBlockRows == 128 ? warp : warp % 4) * 16 + fragment * 16;
  }
  FLASHMOE_HOST_DEVICE static constexpr int chunk(int warp, int c) {
    return kBlockRows == 128 ? c : warp / 4 * kWarpChunks + c;
  }
  FLASHMOE_HOST_DEVICE static constexpr int first_column(int, int) { return 0; }

  // By one thread; a block barrier before any use.
  FLASHMOE_DEVICE static void init(Shared& shared) {
    for (int stage = 0; stage < kStages; ++stage) {
      device::mbarrier_init(&shared.full[stage], 1);
      device::mbarrier_init(&shared.empty[stage], kMathWarps);
    }
    device::fence_mbarrier_init();
  }

  struct Producer {
    PipelinePosition<kStages> position;

    // Loads what Consumer::multiply takes for the same product. By all lanes of the producer warp.
    FLASHMOE_DEVICE void load(Shared& shared, const Product& product) {
      for (int depth = 0; depth < product.depth; depth += kStageDepth) {
        if (device::elect()) load_stage(shared, product, depth);
        position.advance();
      }
      device::warp_sync();
    }

   private:
    FLASHMOE_DEVICE void load_stage(Shared& shared, const Product& product, int depth) {
      Stage& stage = shared.stages[position.stage()];
      device::Mbarrier* full = &shared.full[position.stage()];
      device::mbarrier_wait(&shared.empty[position.stage()], position.empty_parity());
      device::mbarrier_arrive_expect(full, sizeof(Stage));
      device::tma_load(stage.rows, product.rows.map, full, depth, product.row, 0);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        device::tma_load(stage.weights[chunk], product.weights(chunk).map, full,
                         product.first_column(chunk), depth, product.expert);
      }
    }
  };

  struct Consumer {
    PipelinePosition<kStages> position;

    // The sum over `depth` (at least 1) of the product that the producer loads. By all math
    // threads.
    FLASHMOE_DEVICE void multiply(Shared& shared, int depth, Accumulators& accumulators) {
      constexpr int kWarpColumns = kWarpChunks * kChunkColumns;
      constexpr uint32_t kChunkBytes = sizeof(Stage::weights[0]);
      auto& sums = reinterpret_cast<float (&)[kWarpColumns / 2]>(accumulators);
      const int warp = device::warp_index() - kCommWarps - kProducerWarps;
      const int warpgroup = warp / 4;

      int previous = 0;
      for (int begin = 0; begin < depth; begin += kStageDepth) {
        Stage& stage = shared.stages[position.stage()];
        const auto rows =
            device::k_major_descriptor(stage.rows[kBlockRows == 128 ? 64 * warpgroup : 0]);
        const auto weights =
            device::mn_major_descriptor(stage.weights[chunk(4 * warpgroup, 0)], kChunkBytes);
        device::mbarrier_wait(&shared.full[position.stage()], position.full_parity());
        device::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kStageDepth; k += 16) {
          device::wgmma<Element, kWarpColumns>(sums, rows.plus(k * sizeof(Element)),
                                               weights.plus(k * kChunkColumns * sizeof(Element)),
                                               begin > 0 || k > 0);
        }
        device::wgmma_commit();
        // The products of this stage stay in flight while the previous one is given back.
        device::wgmma_wait<1>();
        if (begin > 0) release(shared, previous);
        previous = position.stage();
        position.advance();
      }
      device::wgmma_finish(sums);
      release(shared, previous);
    }

   private:
    FLASHMOE_DEVICE static void release(Shared& shared, int stage) {
      if (device::lane_index() == 0) device::mbarrier_arrive(&shared.empty[stage]);
    }
  };
};

}  // namespace flashmoe::cuda
