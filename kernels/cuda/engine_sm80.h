// The tile engine of Ampere and later: cp.async brings rows and weights to shared memory, ldmatrix
// brings them to registers, mma.sync multiplies them. Four producer warps, eight math warps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/core/host_device.h"
#include "kernels/core/types.h"
#include "kernels/cuda/pipeline.h"
#include "kernels/cuda/product.h"
#include "kernels/device/async_copy.h"
#include "kernels/device/barrier.h"
#include "kernels/device/identity.h"
#include "kernels/device/mbarrier.h"
#include "kernels/device/mma.h"

namespace flashmoe::cuda {

// How float products are made of tf32 ones, which have 11 bits of precision: by rounding both
// factors, or of their leading and trailing parts (three products: a b = a1 b1 + a1 b2 + a2 b1, up
// to 2^-22 of it), which is as exact as fp32.
enum class FloatProduct { kTf32, kThreeTf32 };

template <typename Element_, int kBlockRows_, FloatProduct kFloatProduct = FloatProduct::kThreeTf32>
struct Sm80Engine {
  using Element = Element_;
  static constexpr bool kFloat = std::is_same_v<Element, float>;
  static_assert(std::is_same_v<Element, core::BFloat16> || std::is_same_v<Element, core::Float16> ||
                kFloat);
  static_assert(kBlockRows_ == 128 || kBlockRows_ == 64);

  // Whether products have the error of float, or of a 16-bit element type.
  static constexpr bool kExact = !kFloat || kFloatProduct == FloatProduct::kThreeTf32;
  // Whether rows and weights are described by PeArguments::maps.
  static constexpr bool kTensorMaps = false;
  static constexpr int kSharedLimit = 163 * 1024;  // bytes that a CTA may have on 8.0

  static constexpr int kBlockRows = kBlockRows_;
  static constexpr int kChunks = 2;
  static constexpr int kColumns = kChunks * kChunkColumns;
  static constexpr int kStageDepth = 128 / sizeof(Element);
  static constexpr int kStages = 4;

  static constexpr int kCommWarps = 4;
  static constexpr int kProducerWarps = 4;
  static constexpr int kMathWarps = 8;
  // Whether registers can be moved to the math warps.
  static constexpr bool kMovesRegisters = false;
  static constexpr int kThreads = (kCommWarps + kProducerWarps + kMathWarps) * device::kWarpSize;

  // Both operands move in pieces of 16 bytes.
  static constexpr int kPiece = 16 / sizeof(Element);
  static constexpr int kRowPieces = kStageDepth / kPiece;
  static constexpr int kWeightPieces = kChunkColumns / kPiece;

  // Piece p of a row or line lies where its number's exclusive or with a function of the row or
  // line says, so that the eight pieces that ldmatrix, or the 32 words that a load of a float
  // fragment of the weights takes at a time lie in different banks.
  struct Stage {
    std::byte rows[kBlockRows][kRowPieces][16];
    std::byte weights[kChunks][kStageDepth][kWeightPieces][16];

    FLASHMOE_DEVICE std::byte* row_piece(int row, int piece) {
      return rows[row][piece ^ (row % 8)];
    }
    FLASHMOE_DEVICE std::byte* weight_piece(int chunk, int depth, int piece) {
      return weights[chunk][depth][piece ^ (kFloat ? depth % 4 * 2 : depth % 8)];
    }
  };
  struct Shared {
    alignas(1024) Stage stages[kStages];
    device::Mbarrier full[kStages];   // one arrival of each producer thread
    device::Mbarrier empty[kStages];  // one arrival of each math warp
  };

  // Accumulators of a math thread: m16n8 fragments (pipeline.h). A warp has 32 rows of the same
  // columns of every chunk.
  static constexpr int kRowFragments = 2;
  static constexpr int kWarpChunks = kChunks;
  static constexpr int kRowWarps = kBlockRows / (16 * kRowFragments);
  static constexpr int kColumnWarps = kMathWarps / kRowWarps;
  static constexpr int kWarpColumns = kChunkColumns / kColumnWarps;
  static constexpr int kChunkFragments = kWarpColumns / 8;
  using Accumulators = float[kRowFragments][kWarpChunks][kChunkFragments][4];

  // Of math warp 0 to kMathWarps - 1: the first row of its fragments, its chunks, and the first
  // column of its fragments inside a chunk.
  FLASHMOE_HOST_DEVICE static constexpr int first_row(int warp, int fragment) {
    return (warp % kRowWarps * kRowFragments + fragment) * 16;
  }
  FLASHMOE_HOST_DEVICE static constexpr int chunk(int, int c) { return c; }
  FLASHMOE_HOST_DEVICE static constexpr int first_column(int warp, int) {
    return warp / kRowWarps * kWarpColumns;
  }

  // By one thread; a block barrier before any use.
  FLASHMOE_DEVICE static void init(Shared& shared) {
    for (int stage = 0; stage < kStages; ++stage) {
      device::mbarrier_init(&shared.full[stage], kProducerWarps * device::kWarpSize);
      device::mbarrier_init(&shared.empty[stage], kMathWarps);
    }
    device::fence_mbarrier_init();
  }

  struct Producer {
    PipelinePosition<kStages> position;

    // Loads what Consumer::multiply takes for the same product. By all lanes of all producer warps.
    FLASHMOE_DEVICE void load(Shared& shared, const Product& product) {
      const int thread = device::thread_index() - kCommWarps * device::kWarpSize;
      for (int depth = 0; depth < product.depth; depth += kStageDepth) {
        Stage& stage = shared.stages[position.stage()];
        device::mbarrier_wait(&shared.empty[position.stage()], position.empty_parity());
        load_rows(stage, product, depth, thread);
        load_weights(stage, product, depth, thread);
        device::async_copy_arrive(&shared.full[position.stage()]);
        position.advance();
      }
    }

   private:
    static constexpr int kThreads = kProducerWarps * device::kWarpSize;

    // What is outside the operand is zeros, and not read.
    FLASHMOE_DEVICE static void copy(std::byte* shared, const Operand& operand, int64_t element,
                                     bool inside) {
      const auto* data = static_cast<const Element*>(operand.data);
      device::async_copy_16(shared, inside ? data + element : data, inside ? 16 : 0);
    }

    FLASHMOE_DEVICE static void load_rows(Stage& stage, const Product& product, int depth,
                                          int thread) {
      const int piece = thread % kRowPieces;
      const int from = depth + piece * kPiece;
#pragma unroll
      for (int row = thread / kRowPieces; row < kBlockRows; row += kThreads / kRowPieces) {
        copy(stage.row_piece(row, piece), product.rows,
             int64_t{product.row + row} * product.depth + from,
             row < product.row_count && from < product.depth);
      }
    }

    FLASHMOE_DEVICE static void load_weights(Stage& stage, const Product& product, int depth,
                                             int thread) {
      const int piece = thread % kWeightPieces;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int column = product.first_column(chunk) + piece * kPiece;
#pragma unroll
        for (int line = thread / kWeightPieces; line < kStageDepth;
             line += kThreads / kWeightPieces) {
          const int64_t from = int64_t{product.expert} * product.depth + depth + line;
          copy(stage.weight_piece(chunk, line, piece), product.weights(chunk),
               from * product.width + column,
               depth + line < product.depth && column < product.width);
        }
      }
    }
  };

  struct Consumer {
    PipelinePosition<kStages> position;

    // The sum over `depth` (at least 1) of the product that the producer loads. By all math
    // threads.
    FLASHMOE_DEVICE void multiply(Shared& shared, int depth, Accumulators& accumulators) {
      const int warp = device::warp_index() - kCommWarps - kProducerWarps;
#pragma unroll
      for (int m = 0; m < kRowFragments; ++m) {
#pragma unroll
        for (int c = 0; c < kWarpChunks; ++c) {
#pragma unroll
          for (int n = 0; n < kChunkFragments; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) accumulators[m][c][n][i] = 0;
          }
        }
      }
      for (int begin = 0; begin < depth; begin += kStageDepth) {
        device::mbarrier_wait(&shared.full[position.stage()], position.full_parity());
        multiply_stage(shared.stages[position.stage()], warp, accumulators);
        device::warp_sync();
        if (device::lane_index() == 0) device::mbarrier_arrive(&shared.empty[position.stage()]);
        position.advance();
      }
    }

   private:
    // The depth of one mma is two pieces for every element type.
    static constexpr int kSteps = kRowPieces / 2;

    FLASHMOE_DEVICE static void multiply_stage(Stage& stage, int warp, Accumulators& accumulators) {
      const int lane = device::lane_index();
// A deeper unrolling would not fit into 128 registers.
#pragma unroll kFloat ? 1 : 2
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[kRowFragments][4];
#pragma unroll
        for (int m = 0; m < kRowFragments; ++m) {
          device::load_matrices<false>(
              a[m], stage.row_piece(first_row(warp, m) + lane % 16, 2 * step + lane / 16));
        }
        if constexpr (kFloat) {
          multiply_float(stage, warp, step, a, accumulators);
        } else {
#pragma unroll
          for (int c = 0; c < kWarpChunks; ++c) {
#pragma unroll
            for (int n = 0; n < kChunkFragments; n += 2) {
              const int column = first_column(warp, c) + 8 * n;
              uint32_t b[4];
              device::load_matrices<true>(
                  b, stage.weight_piece(c, 16 * step + lane % 16, column / kPiece + lane / 16));
#pragma unroll
              for (int m = 0; m < kRowFragments; ++m) {
                device::mma<Element>(accumulators[m][c][n], a[m], {b[0], b[1]});
                device::mma<Element>(accumulators[m][c][n + 1], a[m], {b[2], b[3]});
              }
            }
          }
        }
      }
    }

    FLASHMOE_DEVICE static void multiply_float(Stage& stage, int warp, int step,
                                               const uint32_t (&a)[kRowFragments][4],
                                               Accumulators& accumulators) {
      const int lane = device::lane_index();
      uint32_t a_high[kRowFragments][4];
      uint32_t a_low[kRowFragments][4];
#pragma unroll
      for (int m = 0; m < kRowFragments; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) split(device::as_float(a[m][i]), a_high[m][i], a_low[m][i]);
      }
#pragma unroll
      for (int c = 0; c < kWarpChunks; ++c) {
#pragma unroll
        for (int n = 0; n < kChunkFragments; ++n) {
          const int column = first_column(warp, c) + 8 * n + lane / 4;
          uint32_t b_high[2];
          uint32_t b_low[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const std::byte* piece =
                stage.weight_piece(c, 8 * step + 4 * i + lane % 4, column / kPiece);
            split(reinterpret_cast<const float*>(piece)[column % kPiece], b_high[i], b_low[i]);
          }
#pragma unroll
          for (int m = 0; m < kRowFragments; ++m) {
            if constexpr (kFloatProduct == FloatProduct::kThreeTf32) {
              // Apart, since the tensor cores cut what does not fit a sum: an error of one sign for
              // every step, where additions round to either side.
              float sums[4] = {};
              device::mma<float>(sums, a_low[m], b_high);
              device::mma<float>(sums, a_high[m], b_low);
              device::mma<float>(sums, a_high[m], b_high);
#pragma unroll
              for (int i = 0; i < 4; ++i) accumulators[m][c][n][i] += sums[i];
            } else {
              device::mma<float>(accumulators[m][c][n], a_high[m], b_high);
            }
          }
          // Holds back the loads of later columns where there are no registers for them.
          if (kFloatProduct == FloatProduct::kThreeTf32 && kBlockRows == 128 && n % 2 == 1) {
            device::warp_sync();
          }
        }
      }
    }

    // x as the sum of two tf32, up to 2^-22 of it.
    FLASHMOE_DEVICE static void split(float x, uint32_t& high, uint32_t& low) {
      high = device::to_tf32(x);
      if constexpr (kFloatProduct == FloatProduct::kThreeTf32) {
        low = device::to_tf32(x - device::as_float(high));
      } else {
        low = 0;
      }
    }
  };
};

}  // namespace flashmoe::cuda
