// The transport of groups in which some PEs are only reached over the network. A PE still stores to
// the others itself; to those it sends puts with signals (kernels/device/shmem.h).
//
//   publish    the count row that the PE has written into its own heap is put to the same place of
//              the peer's, with `counted` as its signal.
//   dispatch   x is XLA's memory and no source for a put. Rows are copied into `outgoing`, in the
//              order of dispatch; those of one expert lie together there as they do at the peer,
//              so that a batch of them is one message, and their origins another.
//   results    The second stage leaves the results of such a row where the row was: nobody reads
//              that any more when all first-stage tiles of its block are done. The communication
//              warps, which have nothing else to do until results come back, send whole rows as
//              soon as all of their columns are there. The math warps never call NVSHMEM: the
//              compiler could not keep their accumulators in registers round such a call.
//
// Signals. A put orders its own bytes before its own signal and nothing else. Hence a row and its
// origin, two puts, count separately: a row block is complete at two signals for each row, and a PE
// that stores directly adds both at once. And a signal that comes over the network is atomic to
// others of its kind only (NVSHMEM API, "Atomicity Guarantees for Signaling Operations"), not to
// additions of GPUs. Hence `arrived` and `came_back` have a second word each, to which only the
// network adds, and those who wait add up the two.
//
// Why a source may change in the next epoch without a quiet, which waits for the whole PE and has
// no deadline: the owner of a source (a count row, an outgoing row or origin, a received row that
// became a result) or a peer changes it only after it has collected the counts of a later epoch
// from all PEs. Each PE sends those after it has finished this epoch, and to finish it a PE waits
// for the signals of all puts to it: counts, rows, origins, results. So all puts of this epoch are
// at their targets by then, and device::put_signal says why their sources are free.
//
// What has no deadline: a put that waits for room in the queue of the network, which a network that
// stands still does not give. And a kernel may end before the network has taken its results away: a
// process must not exit as soon as its own calls are done.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/core/plan.h"
#include "kernels/cuda/comm_group.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/network_layout.h"
#include "kernels/cuda/transport.h"
#include "kernels/cuda/wait.h"
#include "kernels/device/shmem.h"

namespace flashmoe::cuda {

struct NetworkTransport {
  static constexpr bool kNetwork = true;
  static constexpr int kSignalsOfRow = 2;  // the row's, and its origin's

  FLASHMOE_DEVICE static bool reaches(const Context& context, int32_t pe) {
    return context.arguments.heaps[pe] != nullptr;
  }

  FLASHMOE_DEVICE static std::byte* row(const Context& context, int32_t pe, int32_t row,
                                        int64_t i) {
    return reaches(context, pe) ? DirectTransport::row(context, pe, row, i) : outgoing(context, i);
  }
  FLASHMOE_DEVICE static core::Origin* origin(const Context& context, int32_t pe, int32_t row,
                                              int64_t i) {
    return reaches(context, pe) ? DirectTransport::origin(context, pe, row, i)
                                : outgoing_origin(context, i);
  }
  FLASHMOE_DEVICE static std::byte* result(const Context& context, core::Origin origin,
                                           int32_t row) {
    // Over the network it goes from where the row was.
    return reaches(context, origin.pe) ? DirectTransport::result(context, origin, row)
                                       : DirectTransport::row(context, context.rank, row, 0);
  }
  // Pieces of second-stage tiles that are done for a part of the received rows.
  FLASHMOE_DEVICE static uint32_t* second_done(const Context& context, int32_t part) {
    return own<uint32_t>(context, context.arguments.network.layout.second_done) + part;
  }

  // After the counts are in this PE's own heap and all threads of the group are told so.
  template <int kWarps>
  FLASHMOE_DEVICE static void put_counts(const CommGroup<kWarps>& group, uint64_t word) {
    const Context& context = group.context;
    release_to_network();
    int32_t* counts = context.counts(context.rank, context.rank);
    for (int32_t pe = group.warp(); pe < context.shape().num_pes; pe += kWarps) {
      if (reaches(context, pe)) continue;
      put(context, counts, counts, context.shape().num_experts * sizeof(int32_t),
          context.counted(context.rank, context.rank), word, device::SignalOp::kSet, pe);
    }
  }
  // After `word` of a PE was seen in `counted`, however it came.
  FLASHMOE_DEVICE static void saw_counts(const Context& context, int32_t pe, uint64_t word) {
    device::signal_reached(context.counted(context.rank, pe), word);
  }

  // Puts the rows of a batch that peers over the network get. Lane i: the i-th slot from `first` on
  // in the order of dispatch goes to row `row` of PE `pe`, if it is `kept`. By all lanes, after a
  // fence_before_signal.
  FLASHMOE_DEVICE static void put_rows(const Context& context, int64_t first, int32_t batch,
                                       bool kept, int32_t pe, int32_t row) {
    const int32_t block_rows = context.shape().block_rows;
    const bool sends = kept && !reaches(context, pe);
    const uint32_t senders = device::ballot(sends);
    for (int32_t i = 0; i < batch;) {
      if ((senders >> i & 1u) == 0) {
        ++i;
        continue;
      }
      const int32_t to_pe = device::shuffle(pe, i), to_row = device::shuffle(row, i);
      // How many slots follow each other there as they do here, in one row block.
      const bool follows = sends && pe == to_pe && row - to_row == device::lane_index() - i &&
                           row / block_rows == to_row / block_rows;
      const uint32_t others = ~(device::ballot(follows) >> i);
      int32_t rows = 1;
      while (i + rows < batch && (others >> rows & 1u) == 0) ++rows;
      send_rows(context, first + i, rows, to_pe, to_row);
      i += rows;
    }
  }

  FLASHMOE_DEVICE static bool wait_for_rows(const Context& context, int32_t block, uint64_t rows) {
    return wait_for_both(context, context.arrived(context.rank, block),
                         own<uint64_t>(context, context.arguments.network.layout.arrived) + block,
                         kSignalsOfRow, rows, Failure::kRows, block);
  }
  FLASHMOE_DEVICE static bool wait_for_results(const Context& context, int32_t token,
                                               uint64_t pieces) {
    uint64_t* direct = context.came_back(context.rank, token);
    uint64_t* network = came_back(context, token);
    const bool came = wait_for_both(context, direct, network, 1, pieces, Failure::kResults, token);
    device::store_relaxed<device::Scope::kSystem>(direct, uint64_t{0});
    device::store_relaxed<device::Scope::kSystem>(network, uint64_t{0});
    return came;
  }

  // Sends results to peers over the network as they become complete; false: the PE has failed. A
  // row is complete after `pieces` pieces, which are also what it adds to `came_back`.
  template <int kWarps>
  FLASHMOE_DEVICE static bool put_results(const CommGroup<kWarps>& group, uint32_t pieces) {
    const Context& context = group.context;
    const core::Plan plan = context.plan();
    const int32_t local = context.shape().local_experts();
    // The parts of all experts, in the order in which they become complete, a warp each in turn.
    int64_t next = group.warp_of_pe();
    int64_t before = 0;
    for (int32_t e = context.rank * local; e < (context.rank + 1) * local; ++e) {
      const int64_t parts = core::ceil_div(plan.kept[e], kRowsOfPart);
      for (; next < before + parts; next += group.warps_of_pe()) {
        const int32_t first = static_cast<int32_t>(next - before) * kRowsOfPart;
        const int32_t rows = plan.kept[e] - first;
        if (!put_part(context, plan.first_row[e] + first, rows < kRowsOfPart ? rows : kRowsOfPart,
                      pieces)) {
          return false;
        }
      }
      before += parts;
    }
    return true;
  }

  // Makes signals and counters zero for the next epoch. By `threads` threads, of which this is
  // number `thread`.
  FLASHMOE_DEVICE static void reset(const Context& context, int32_t thread, int32_t threads) {
    const NetworkLayout& layout = context.arguments.network.layout;
    for (int64_t i = thread; i < layout.arrived.count; i += threads) {
      device::store_relaxed<device::Scope::kSystem>(own<uint64_t>(context, layout.arrived) + i,
                                                    uint64_t{0});
    }
    for (int64_t i = thread; i < layout.second_done.count; i += threads) {
      device::store_relaxed<device::Scope::kGpu>(second_done(context, static_cast<int32_t>(i)), 0u);
    }
  }

 private:
  // Where the row and the origin of the i-th slot in the order of dispatch wait for their puts.
  FLASHMOE_DEVICE static std::byte* outgoing(const Context& context, int64_t i) {
    const core::Section& section = context.arguments.network.layout.outgoing;
    return own<std::byte>(context, section) + i * section.stride;
  }
  FLASHMOE_DEVICE static core::Origin* outgoing_origin(const Context& context, int64_t i) {
    return own<core::Origin>(context, context.arguments.network.layout.outgoing_origin) + i;
  }

  template <typename T>
  FLASHMOE_DEVICE static T* own(const Context& context, const core::Section& section) {
    return context.heap<T>(context.rank, section);
  }
  FLASHMOE_DEVICE static uint64_t* came_back(const Context& context, int32_t token) {
    return own<uint64_t>(context, context.arguments.network.layout.came_back) + token;
  }

  // What any lane has written or seen reaches the network before later puts do. By all lanes.
  FLASHMOE_DEVICE static void release_to_network() {
    device::warp_sync();
    device::fence<device::Scope::kSystem>();
  }
  FLASHMOE_DEVICE static void put(const Context& context, void* target, const void* source,
                                  size_t bytes, uint64_t* signal, uint64_t value,
                                  device::SignalOp operation, int32_t pe) {
    device::put_signal(target, source, bytes, signal, value, operation,
                       context.arguments.network.processes[pe]);
  }

  FLASHMOE_DEVICE static void send_rows(const Context& context, int64_t first, int32_t rows,
                                        int32_t pe, int32_t row) {
    const core::HeapLayout& heap = context.arguments.heap;
    uint64_t* signal = own<uint64_t>(context, context.arguments.network.layout.arrived) +
                       row / context.shape().block_rows;
    const auto value = static_cast<uint64_t>(rows);
    put(context, own<core::Origin>(context, heap.origin) + row, outgoing_origin(context, first),
        value * sizeof(core::Origin), signal, value, device::SignalOp::kAdd, pe);
    put(context, own<std::byte>(context, heap.recv) + row * heap.recv.stride,
        outgoing(context, first), value * static_cast<uint64_t>(heap.recv.stride), signal, value,
        device::SignalOp::kAdd, pe);
  }

  // Waits for a sum of signals: `direct` by those who store here themselves, `network` by the
  // others. `expected` counts what comes in `signals_each` signals.
  FLASHMOE_DEVICE static bool wait_for_both(const Context& context, const uint64_t* direct,
                                            uint64_t* network, uint64_t signals_each,
                                            uint64_t expected, Failure failure, int64_t awaited) {
    uint64_t signals = 0;
    const bool came = wait_until(
        context, failure, awaited, expected,
        [&] {
          signals = device::signal_fetch(network);
          return (device::load_acquire<device::Scope::kSystem>(direct) + signals) / signals_each;
        },
        [&](uint64_t seen) { return seen >= expected; });
    return came && (signals == 0 || device::signal_reached(network, signals));
  }

  // Received rows from `first` on, which are one part or its beginning.
  FLASHMOE_DEVICE static bool put_part(const Context& context, int32_t first, int32_t rows,
                                       uint32_t pieces) {
    bool ok = true;
    if (device::lane_index() == 0) {
      const int32_t part = first / kRowsOfPart;
      ok = wait_for_count<device::Scope::kGpu>(context, second_done(context, part), pieces,
                                               Failure::kSecondStage, part);
    }
    if (!device::all(ok)) return false;
    release_to_network();
    const core::HeapLayout& heap = context.arguments.heap;
    core::Origin origin{context.rank, 0};
    if (device::lane_index() < rows) {
      origin = own<core::Origin>(context, heap.origin)[first + device::lane_index()];
    }
    for (int32_t i = 0; i < rows; ++i) {
      const int32_t pe = device::shuffle(origin.pe, i), slot = device::shuffle(origin.slot, i);
      if (reaches(context, pe)) continue;
      put(context, own<std::byte>(context, heap.returned) + slot * heap.returned.stride,
          own<std::byte>(context, heap.recv) + (first + i) * heap.recv.stride,
          static_cast<size_t>(heap.recv.stride),
          came_back(context, slot / context.shape().experts_per_token), pieces,
          device::SignalOp::kAdd, pe);
    }
    return true;
  }
};

}  // namespace flashmoe::cuda
