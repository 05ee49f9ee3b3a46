// Step 4 of an epoch: every kept row is put at its place in the heap of its expert's PE.
//
// The communication warps of all CTAs go through the PE's list together, a batch each in turn, so
// that the rows of the experts that come first are on their way first. A batch shares one fence.
//
// Warps copy, 16 bytes per lane, from x straight to the peer. Bulk copies (PTX ISA,
// `cp.async.bulk`) have not been measured beside that. They would take every row by way of shared
// memory, of which the largest engine leaves 5 KiB, and one row at a time, for rows that follow
// each other in the list are neither together in x nor, at the next expert, at the peer.
#pragma once

#include <cstdint>

#include "kernels/cuda/comm_group.h"
#include "kernels/cuda/vector.h"

namespace flashmoe::cuda {

// Rows of a batch when there are enough for all warps.
inline constexpr int32_t kDispatchBatch = 8;

template <typename Transport, int kWarps>
FLASHMOE_DEVICE void dispatch(const CommGroup<kWarps>& group) {
  const Context& context = group.context;
  const core::Shape& shape = context.shape();
  const core::Plan plan = group.plan();
  const int32_t* send = context.workspace<int32_t>(context.arguments.workspace.send);
  const int32_t* position = context.workspace<int32_t>(context.arguments.workspace.position);
  const int64_t row_bytes = context.arguments.heap.recv.stride;
  const std::byte* x = static_cast<const std::byte*>(context.pe.x);

  const int32_t last_expert =
      core::dispatch_step(shape, context.rank, core::dispatch_steps(shape) - 1).expert;
  const int32_t rows = group.shared.start[last_expert] + group.shared.count[last_expert];
  const int32_t share = static_cast<int32_t>(core::ceil_div(rows, group.warps_of_pe()));
  const int32_t batch = share < kDispatchBatch ? share : kDispatchBatch;

  for (int64_t first = int64_t{group.warp_of_pe()} * batch; first < rows;
       first += int64_t{group.warps_of_pe()} * batch) {
    // Lane i looks up where row i of the batch goes; then the warp copies row by row.
    int32_t slot = -1, pe = 0, row = 0;
    if (group.lane() < batch && first + group.lane() < rows) {
      slot = send[first + group.lane()];
      const int32_t expert = context.pe.indices[slot];
      pe = plan.owner(expert);
      row = plan.place(context.rank, expert) + position[slot];
      if (position[slot] >= plan.kept_rows(context.rank, expert)) slot = -1;
    }
    for (int32_t i = 0; i < batch; ++i) {
      const int32_t source = device::shuffle(slot, i);
      const int32_t to_pe = device::shuffle(pe, i);
      const int32_t to_row = device::shuffle(row, i);
      if (source < 0) continue;
      copy_by_warp(Transport::row(context, to_pe, to_row, first + i),
                   x + (source / shape.experts_per_token) * row_bytes, row_bytes, group.lane());
    }
    if (slot >= 0) {
      *Transport::origin(context, pe, row, first + group.lane()) = core::Origin{context.rank, slot};
    }
    device::warp_sync();
    context.fence_before_signal();
    if (slot >= 0 && Transport::reaches(context, pe)) {
      device::add_relaxed<device::Scope::kSystem>(context.arrived(pe, row / shape.block_rows),
                                                  uint64_t{Transport::kSignalsOfRow});
    }
    if constexpr (Transport::kNetwork) {
      Transport::put_rows(context, first, batch, slot >= 0, pe, row);
    }
  }
}

}  // namespace flashmoe::cuda
