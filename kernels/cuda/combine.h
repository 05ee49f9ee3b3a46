// Step 6 of an epoch: y of a token is the weighted sum of what its experts returned, in float,
// slots ascending. One warp per token, of all warps of the PE: the communication warps come to it
// while tiles are computed, the others when there are no more tiles.
#pragma once

#include <cstdint>

#include "kernels/cuda/context.h"
#include "kernels/cuda/vector.h"
#include "kernels/device/warp.h"

namespace flashmoe::cuda {

namespace internal {

// Rows of a token that are on their way to a thread at once.
inline constexpr int kRowsInFlight = 4;

// y = sum of weight[j] * row[j] over the slots j in the mask. weight is lane j's.
template <typename Element>
FLASHMOE_DEVICE void weighted_sum(Element* y, const Element* returned, uint32_t mask, float weight,
                                  int32_t hidden, int32_t lane) {
  constexpr int kWidth = kVectorElements<Element>;
  for (int32_t first = 0; first < hidden; first += device::kWarpSize * kWidth) {
    const int32_t column = first + lane * kWidth;
    float sum[kWidth] = {};
    for (uint32_t left = mask; left != 0;) {
      Elements<Element> rows[kRowsInFlight];
      uint32_t slots = left;
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        const bool has_part = left != 0 && column < hidden;
        const auto* part = reinterpret_cast<const Elements<Element>*>(
            returned + int64_t{has_part ? device::lowest_bit(left) : 0} * hidden + column);
        rows[i] = has_part ? *part : Elements<Element>{};
        left &= left - 1;
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        if (slots != 0) {
          const float w = device::shuffle(weight, device::lowest_bit(slots));
#pragma unroll
          for (int j = 0; j < kWidth; ++j) sum[j] += w * device::to_float(rows[i].values[j]);
        }
        slots &= slots - 1;
      }
    }
    if (column < hidden) {
      Elements<Element> result;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) result.values[i] = device::from_float<Element>(sum[i]);
      *reinterpret_cast<Elements<Element>*>(y + column) = result;
    }
  }
}

}  // namespace internal

// By all lanes of warp `warp` of `warps` of each CTA. kPiecesPerTile: signals that each tile of the
// second stage sends for a row.
template <typename Element, int kPiecesPerTile, typename Transport>
FLASHMOE_DEVICE void combine(const Context& context, const core::Plan& plan, int32_t warp,
                             int32_t warps) {
  const core::Shape& shape = context.shape();
  const int32_t k = shape.experts_per_token;
  const int32_t lane = device::lane_index();
  const int32_t* position = context.workspace<int32_t>(context.arguments.workspace.position);
  const Element* returned = context.heap<Element>(context.rank, context.arguments.heap.returned);
  Element* y = static_cast<Element*>(context.pe.y);
  const uint32_t pieces = static_cast<uint32_t>(shape.hidden_tiles()) * kPiecesPerTile;
  const int32_t ctas = context.arguments.ctas;

  for (int32_t token = warp * ctas + context.cta; token < shape.tokens; token += warps * ctas) {
    const int32_t slot = token * k + lane;
    bool kept = false;
    float weight = 0;
    if (lane < k) {
      const int32_t expert = context.pe.indices[slot];
      kept = expert >= 0 && position[slot] < plan.kept_rows(context.rank, expert);
      if (kept) weight = context.pe.weights[slot];
    }
    const uint32_t mask = device::ballot(kept);
    bool ok = true;
    if (lane == 0) {
      ok = Transport::wait_for_results(context, token, uint64_t{pieces} * device::count_bits(mask));
    }
    if (!device::all(ok)) return;
    device::warp_sync();
    internal::weighted_sum(y + int64_t{token} * shape.hidden,
                           returned + int64_t{token} * k * shape.hidden, mask, weight, shape.hidden,
                           lane);
  }
}

}  // namespace flashmoe::cuda
