// The plan of an epoch: where every row of every source goes, computed by every PE for itself from
// the same count matrix. No message and no atomic is needed, and the places do not change from run
// to run: the rows of an expert lie in global token order (PE, then token, then slot).
#pragma once

#include <cstdint>

#include "kernels/core/host_device.h"
#include "kernels/core/shape.h"

namespace flashmoe::core {

struct Plan {
  Shape shape;
  const int32_t* counts;  // [P][E] rows each source wants to send
  int32_t* start;         // [P][E] rows of the expert that come from lower PEs
  int32_t* kept;          // [E] rows the expert keeps
  int32_t* first_row;     // [E] its first row in the receive buffer of its PE
  int64_t cap;            // rows any expert keeps at most

  FLASHMOE_HOST_DEVICE int32_t owner(int32_t expert) const {
    return expert / shape.local_experts();
  }
  // Rows of `source` for `expert` that are kept: the first ones, the others are dropped.
  FLASHMOE_HOST_DEVICE int32_t kept_rows(int32_t source, int32_t expert) const {
    const int32_t i = source * shape.num_experts + expert;
    const int32_t room = kept[expert] - start[i];
    return room < 0 ? 0 : (room < counts[i] ? room : counts[i]);
  }
  // Where the first row of `source` for `expert` goes in the receive buffer of the owner.
  FLASHMOE_HOST_DEVICE int32_t place(int32_t source, int32_t expert) const {
    return first_row[expert] + start[source * shape.num_experts + expert];
  }
  FLASHMOE_HOST_DEVICE int32_t first_block(int32_t expert) const {
    return first_row[expert] / shape.block_rows;
  }
  FLASHMOE_HOST_DEVICE int32_t blocks(int32_t expert) const {
    return static_cast<int32_t>(ceil_div(kept[expert], shape.block_rows));
  }
  // Rows of the expert's i-th row block, and so what its `arrived` signal must reach.
  FLASHMOE_HOST_DEVICE int32_t rows_in_block(int32_t expert, int32_t i) const {
    const int32_t rest = kept[expert] - i * shape.block_rows;
    return rest < shape.block_rows ? rest : shape.block_rows;
  }
};

// True if no PE gets more than max_rows rows when every expert keeps at most `cap`.
// `wanted` is [E], the rows sent to each expert by all sources.
FLASHMOE_HOST_DEVICE inline bool fits(const Shape& shape, const int32_t* wanted, int64_t cap) {
  const int32_t local = shape.local_experts();
  for (int32_t pe = 0; pe < shape.num_pes; ++pe) {
    int64_t rows = 0;
    for (int32_t e = pe * local; e < (pe + 1) * local; ++e) {
      rows += wanted[e] < cap ? wanted[e] : cap;
    }
    if (rows > shape.max_rows) return false;
  }
  return true;
}

// Water-filling: the largest equal cap per expert, not above the capacity, that fits every PE.
FLASHMOE_HOST_DEVICE inline int64_t row_cap(const Shape& shape, const int32_t* wanted) {
  int64_t high = 0;
  for (int32_t e = 0; e < shape.num_experts; ++e) high = wanted[e] > high ? wanted[e] : high;
  if (shape.capacity != kNoCapacity && shape.capacity < high) high = shape.capacity;
  const bool never_full = shape.num_pes * shape.slots() <= shape.max_rows;
  if (never_full || fits(shape, wanted, high)) return high;
  int64_t low = 0;  // fits; high does not
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (fits(shape, wanted, middle) ? low : high) = middle;
  }
  return low;
}

// The three steps of a plan. A GPU does the first for many experts at a time and the last for many
// PEs; each step needs all of the one before.

// Fills start[.][e], and kept[e] with all rows that are sent to the expert.
FLASHMOE_HOST_DEVICE inline void add_up_rows(Plan& plan, int32_t e) {
  int32_t rows = 0;
  for (int32_t pe = 0; pe < plan.shape.num_pes; ++pe) {
    const int32_t i = pe * plan.shape.num_experts + e;
    plan.start[i] = rows;
    rows += plan.counts[i];
  }
  plan.kept[e] = rows;
}
FLASHMOE_HOST_DEVICE inline void choose_cap(Plan& plan) {
  plan.cap = row_cap(plan.shape, plan.kept);
}
// Fills kept and first_row of the experts of a PE.
FLASHMOE_HOST_DEVICE inline void place_experts(Plan& plan, int32_t pe) {
  const int32_t local = plan.shape.local_experts();
  int32_t next = 0;
  for (int32_t e = pe * local; e < (pe + 1) * local; ++e) {
    if (plan.kept[e] > plan.cap) plan.kept[e] = static_cast<int32_t>(plan.cap);
    plan.first_row[e] = next;
    next += static_cast<int32_t>(round_up(plan.kept[e], plan.shape.block_rows));
  }
}

// Fills the plan's arrays from its shape and counts.
FLASHMOE_HOST_DEVICE inline void build_plan(Plan& plan) {
  for (int32_t e = 0; e < plan.shape.num_experts; ++e) add_up_rows(plan, e);
  choose_cap(plan);
  for (int32_t pe = 0; pe < plan.shape.num_pes; ++pe) place_experts(plan, pe);
}

}  // namespace flashmoe::core
