// Step 6 of an epoch: y of a token is the weighted sum of what its experts returned, in float,
// slots ascending. One warp per token, of all communication warps of the PE.
#pragma once

#include <cstdint>

#include "kernels/cuda/comm_group.h"
#include "kernels/cuda/vector.h"

namespace flashmoe::cuda {

namespace internal {

// y = sum of weight[j] * row[j] over the slots j in the mask. weight is lane j's.
template <typename Element>
FLASHMOE_DEVICE void weighted_sum(Element* y, const Element* returned, uint32_t mask, float weight,
                                  int32_t hidden, int32_t lane) {
  constexpr int kWidth = kVectorElements<Element>;
  for (int32_t first = 0; first < hidden; first += device::kWarpSize * kWidth) {
    const int32_t column = first + lane * kWidth;
    float sum[kWidth] = {};
#pragma unroll 4
    for (int j = 0; j < kMaxExpertsPerToken; ++j) {
      if ((mask >> j) == 0) break;
      const float w = device::shuffle(weight, j);
      if ((mask >> j & 1u) == 0 || column >= hidden) continue;
      const auto row =
          *reinterpret_cast<const Elements<Element>*>(returned + int64_t{j} * hidden + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[i] += w * device::to_float(row.values[i]);
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

// kPiecesPerTile: signals that each tile of the second stage sends for a row.
template <typename Element, int kPiecesPerTile, typename Transport, int kWarps>
FLASHMOE_DEVICE void combine(const CommGroup<kWarps>& group) {
  const Context& context = group.context;
  const core::Shape& shape = context.shape();
  const core::Plan plan = context.plan();
  const int32_t k = shape.experts_per_token;
  const int32_t* position = context.workspace<int32_t>(context.arguments.workspace.position);
  const Element* returned = context.heap<Element>(context.rank, context.arguments.heap.returned);
  Element* y = static_cast<Element*>(context.pe.y);
  const uint32_t pieces = static_cast<uint32_t>(shape.hidden_tiles()) * kPiecesPerTile;

  for (int32_t token = group.warp_of_pe(); token < shape.tokens; token += group.warps_of_pe()) {
    const int32_t slot = token * k + group.lane();
    bool kept = false;
    float weight = 0;
    if (group.lane() < k) {
      const int32_t expert = context.pe.indices[slot];
      kept = expert >= 0 && position[slot] < plan.kept_rows(context.rank, expert);
      if (kept) weight = context.pe.weights[slot];
    }
    const uint32_t mask = device::ballot(kept);
    bool ok = true;
    if (group.lane() == 0) {
      ok = Transport::wait_for_results(context, token, uint64_t{pieces} * device::count_bits(mask));
    }
    if (!device::all(ok)) return;
    device::warp_sync();
    internal::weighted_sum(y + int64_t{token} * shape.hidden,
                           returned + int64_t{token} * k * shape.hidden, mask, weight, shape.hidden,
                           group.lane());
  }
}

}  // namespace flashmoe::cuda
