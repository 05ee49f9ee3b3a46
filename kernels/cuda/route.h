// Steps 1 to 3 of an epoch (docs/protocol.md: route, publish, plan): the rows of every expert are
// counted, ranked in token order and listed in the order of dispatch, the counts of all PEs
// exchanged, and the plan computed. No atomic decides an order, so nothing changes from run to run.
//
// Each CTA counts and ranks the slots of its own piece of tokens. After a barrier of the PE it
// knows from the counts of all CTAs where its rows of each expert come in the PE's list. Meanwhile
// CTA 0 publishes, waits for the other PEs and plans. A second barrier ends both.
#pragma once

#include <cstdint>

#include "kernels/core/plan.h"
#include "kernels/core/tile_order.h"
#include "kernels/cuda/comm_group.h"
#include "kernels/device/element.h"

namespace flashmoe::cuda {

namespace internal {

template <int kWarps>
FLASHMOE_DEVICE bool check_slots(const CommGroup<kWarps>& group) {
  const Context& context = group.context;
  const core::Shape& shape = context.shape();
  bool ok = true;
  const int32_t k = shape.experts_per_token;
  group.for_each(group.first_token() * k, group.last_token() * k, [&](int32_t slot) {
    const int32_t expert = context.pe.indices[slot];
    if (expert < -1 || expert >= shape.num_experts) {
      fail(context, Failure::kBadIndex, -1, static_cast<uint64_t>(slot),
           static_cast<uint64_t>(static_cast<int64_t>(expert)));
      ok = false;
    } else if (expert >= 0 && context.arguments.check_weights) {
      const float weight = context.pe.weights[slot];
      if (!(weight - weight == 0.0f)) {
        fail(context, Failure::kBadWeight, -1, static_cast<uint64_t>(slot), 0);
        ok = false;
      }
    }
  });
  return ok;
}

// Ranks the slots of this CTA's tokens among those of the same expert, in slot order, and leaves
// the number of each expert's rows in shared.count. By one warp: the order is the warp's own.
template <int kWarps>
FLASHMOE_DEVICE void rank_slots(const CommGroup<kWarps>& group) {
  const Context& context = group.context;
  const int32_t k = context.shape().experts_per_token;
  int32_t* position = context.workspace<int32_t>(context.arguments.workspace.position);
  const int32_t end = group.last_token() * k;
  int32_t slot = group.first_token() * k + group.lane();
  int32_t next = slot < end ? context.pe.indices[slot] : -1;
  for (; device::any(slot < end); slot += device::kWarpSize) {
    const int32_t expert = next;
    // Read before it is needed.
    next = slot + device::kWarpSize < end ? context.pe.indices[slot + device::kWarpSize] : -1;
    const uint32_t same = device::match_any(static_cast<uint32_t>(expert));
    const uint32_t lower = same & ((1u << group.lane()) - 1u);
    if (expert >= 0) {
      position[slot] = group.shared.count[expert] + device::count_bits(lower);
    }
    device::warp_sync();
    // The highest lane of each expert counts for all of them.
    if (expert >= 0 && device::highest_bit(same) == group.lane()) {
      group.shared.count[expert] += device::count_bits(same);
    }
    device::warp_sync();
  }
}

// From the counts of all CTAs: shared.count becomes the number of the PE's rows of each expert, and
// shared.before how many of them earlier CTAs have.
template <int kWarps>
FLASHMOE_DEVICE void add_up_ctas(const CommGroup<kWarps>& group) {
  const Context& context = group.context;
  const int32_t experts = context.shape().num_experts;
  const int32_t* counts = context.workspace<int32_t>(context.arguments.workspace.cta_counts);
  group.for_each(0, experts, [&](int32_t e) {
    int32_t before = 0, total = 0;
#pragma unroll 16  // so many loads at once
    for (int32_t cta = 0; cta < context.arguments.ctas; ++cta) {
      if (cta == context.cta) before = total;
      total += counts[int64_t{cta} * experts + e];
    }
    group.shared.count[e] = total;
    group.shared.before[e] = before;
  });
}

// Where each expert's rows begin in the list of the PE, which is in the order of dispatch. By one
// warp.
template <int kWarps>
FLASHMOE_DEVICE void order_experts(const CommGroup<kWarps>& group) {
  const core::Shape& shape = group.context.shape();
  const int32_t steps = static_cast<int32_t>(core::dispatch_steps(shape));
  int32_t next = 0;
  for (int32_t first = 0; first < steps; first += device::kWarpSize) {
    const int32_t step = first + group.lane();
    int32_t expert = 0, rows = 0;
    if (step < steps) {
      expert = core::dispatch_step(shape, group.context.rank, step).expert;
      rows = group.shared.count[expert];
    }
    int32_t end = rows;  // inclusive sum over the lanes
    for (int32_t distance = 1; distance < device::kWarpSize; distance *= 2) {
      const int32_t lower =
          device::shuffle(end, (group.lane() + device::kWarpSize - distance) % device::kWarpSize);
      if (group.lane() >= distance) end += lower;
    }
    if (step < steps) group.shared.start[expert] = next + end - rows;
    next += device::shuffle(end, device::kWarpSize - 1);
  }
}

// Turns ranks within the CTA into positions within the PE, and lists the slots.
template <int kWarps>
FLASHMOE_DEVICE void list_slots(const CommGroup<kWarps>& group) {
  const Context& context = group.context;
  const int32_t k = context.shape().experts_per_token;
  int32_t* position = context.workspace<int32_t>(context.arguments.workspace.position);
  int32_t* send = context.workspace<int32_t>(context.arguments.workspace.send);
  group.for_each(group.first_token() * k, group.last_token() * k, [&](int32_t slot) {
    const int32_t expert = context.pe.indices[slot];
    if (expert < 0) return;
    position[slot] += group.shared.before[expert];
    send[group.shared.start[expert] + position[slot]] = slot;
  });
}

// Puts this PE's counts into the heaps of all PEs, then says so.
template <typename Transport, int kWarps>
FLASHMOE_DEVICE void publish(const CommGroup<kWarps>& group) {
  const Context& context = group.context;
  const core::Shape& shape = context.shape();
  group.for_each(0, shape.num_pes * shape.num_experts, [&](int32_t i) {
    const int32_t pe = i / shape.num_experts, expert = i % shape.num_experts;
    if (!Transport::reaches(context, pe)) return;
    context.counts(pe, context.rank)[expert] = group.shared.count[expert];
  });
  context.fence_before_signal();
  group.sync();
  const uint64_t word = core::counted_word(context.arguments.tag, context.epoch);
  group.for_each(0, shape.num_pes, [&](int32_t pe) {
    if (!Transport::reaches(context, pe)) return;
    device::store_release<device::Scope::kSystem>(context.counted(pe, context.rank), word);
  });
  if constexpr (Transport::kNetwork) Transport::put_counts(group, word);
}

// Waits for the counts of every PE.
template <typename Transport, int kWarps>
FLASHMOE_DEVICE bool collect_counts(const CommGroup<kWarps>& group) {
  const Context& context = group.context;
  const uint32_t tag = context.arguments.tag;
  bool ok = true;
  group.for_each(0, context.shape().num_pes, [&](int32_t pe) {
    const uint64_t* word = context.counted(context.rank, pe);
    uint64_t last = 0;
    const bool came = wait_until(
        context, Failure::kCounts, pe, core::counted_word(tag, context.epoch),
        [&] { return device::load_acquire<device::Scope::kSystem>(word); },
        [&](uint64_t seen) {
          last = seen;
          return core::judge_counted(seen, tag, context.epoch) != core::Counted::kNotYet;
        });
    if (came && core::judge_counted(last, tag, context.epoch) == core::Counted::kOtherCall) {
      fail(context, Failure::kOtherCall, pe, core::counted_word(tag, context.epoch), last);
      ok = false;
    }
    if constexpr (Transport::kNetwork) {
      if (came) Transport::saw_counts(context, pe, last);
    }
    ok = ok && came;
  });
  return ok;
}

template <int kWarps>
FLASHMOE_DEVICE void make_plan(const CommGroup<kWarps>& group) {
  const Context& context = group.context;
  const core::Shape& shape = context.shape();
  core::Plan plan = group.plan();
  group.for_each(0, shape.num_experts, [&](int32_t e) { core::add_up_rows(plan, e); });
  group.sync();
  core::choose_cap(plan);  // by every thread alike
  group.sync();            // kept is read above and written below
  group.for_each(0, shape.num_pes, [&](int32_t pe) { core::place_experts(plan, pe); });
  group.sync();
  const core::Plan published = context.plan();
  group.for_each(0, shape.num_experts, [&](int32_t e) {
    published.kept[e] = plan.kept[e];
    published.first_row[e] = plan.first_row[e];
  });
  if (group.warp() == 0) {
    int32_t dropped = 0;
    for (int32_t e = group.lane(); e < shape.num_experts; e += device::kWarpSize) {
      dropped += group.shared.count[e] - plan.kept_rows(context.rank, e);
    }
    for (int32_t distance = 1; distance < device::kWarpSize; distance *= 2) {
      dropped += device::shuffle_xor(dropped, distance);
    }
    if (group.lane() == 0) *context.pe.dropped = dropped;
  }
}

}  // namespace internal

// By all communication warps; false if the PE has failed.
template <typename Transport, int kWarps>
FLASHMOE_DEVICE bool route_and_plan(const CommGroup<kWarps>& group) {
  const Context& context = group.context;
  const int32_t experts = context.shape().num_experts;
  group.for_each(0, experts, [&](int32_t e) { group.shared.count[e] = 0; });
  if (!group.all_ok(internal::check_slots(group))) return false;
  if (group.warp() == 0) internal::rank_slots(group);
  group.sync();
  int32_t* counts = context.workspace<int32_t>(context.arguments.workspace.cta_counts);
  group.for_each(0, experts, [&](int32_t e) {
    counts[int64_t{context.cta} * experts + e] = group.shared.count[e];
  });
  if (!group.pe_barrier(1, true)) return false;

  internal::add_up_ctas(group);
  group.sync();
  if (context.cta == 0) internal::publish<Transport>(group);
  if (group.warp() == 0) internal::order_experts(group);
  group.sync();
  internal::list_slots(group);
  bool ok = true;
  if (context.cta == 0) {
    ok = group.all_ok(internal::collect_counts<Transport>(group));
    if (ok) internal::make_plan(group);
  }
  if (!group.pe_barrier(2, ok)) return false;
  const core::Plan published = context.plan();
  group.for_each(0, experts, [&](int32_t e) {
    group.plan_shared.kept[e] = published.kept[e];
    group.plan_shared.first_row[e] = published.first_row[e];
  });
  group.sync();
  return true;
}

}  // namespace flashmoe::cuda
