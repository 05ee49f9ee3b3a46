// How rows, results and signals get to other PEs: a policy of the kernel. This one is for groups
// whose PEs all address each other's heaps, and adds nothing to what the roles do: they store there
// themselves. NetworkTransport (network_transport.h) is for all other groups.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/context.h"
#include "kernels/cuda/wait.h"

namespace flashmoe::cuda {

struct DirectTransport {
  static constexpr bool kNetwork = false;
  // What a received row adds to the signal of its row block.
  static constexpr int kSignalsOfRow = 1;

  // Whether this PE stores to that one itself.
  FLASHMOE_DEVICE static bool reaches(const Context&, int32_t) { return true; }

  // Where a row and its origin are written that become row `row` of PE `pe`; they are the `i`-th in
  // the order of dispatch.
  FLASHMOE_DEVICE static std::byte* row(const Context& context, int32_t pe, int32_t row, int64_t) {
    const core::Section& recv = context.arguments.heap.recv;
    return context.heap<std::byte>(pe, recv) + row * recv.stride;
  }
  FLASHMOE_DEVICE static core::Origin* origin(const Context& context, int32_t pe, int32_t row,
                                              int64_t) {
    return context.heap<core::Origin>(pe, context.arguments.heap.origin) + row;
  }
  // Where the result of received row `row` is written.
  FLASHMOE_DEVICE static std::byte* result(const Context& context, core::Origin origin, int32_t) {
    const core::Section& returned = context.arguments.heap.returned;
    return context.heap<std::byte>(origin.pe, returned) + origin.slot * returned.stride;
  }

  // Waits until `rows` rows of a row block are here; false: the PE has failed. By one thread.
  FLASHMOE_DEVICE static bool wait_for_rows(const Context& context, int32_t block, uint64_t rows) {
    return wait_for_count<device::Scope::kSystem>(context, context.arrived(context.rank, block),
                                                  rows, Failure::kRows, block);
  }

  // The same for the results of a token; then its signal is zero again.
  FLASHMOE_DEVICE static bool wait_for_results(const Context& context, int32_t token,
                                               uint64_t pieces) {
    uint64_t* came_back = context.came_back(context.rank, token);
    const bool came = wait_for_count<device::Scope::kSystem>(context, came_back, pieces,
                                                             Failure::kResults, token);
    // Nobody adds to it again before this PE publishes its next counts.
    device::store_relaxed<device::Scope::kSystem>(came_back, uint64_t{0});
    return came;
  }
};

}  // namespace flashmoe::cuda
