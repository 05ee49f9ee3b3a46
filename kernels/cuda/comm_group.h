// The communication warps of a CTA as a group, and with those of the PE's other CTAs: barriers that
// end with one answer for all threads.
#pragma once

#include <cstdint>

#include "kernels/cuda/context.h"
#include "kernels/cuda/wait.h"
#include "kernels/device/barrier.h"
#include "kernels/device/warp.h"

namespace flashmoe::cuda {

inline constexpr int kMaxExperts = 512;
inline constexpr int kMaxCommWarps = 4;

// A CTA's copy of those parts of the plan that are looked up most.
struct PlanShared {
  int32_t kept[kMaxExperts];
  int32_t first_row[kMaxExperts];

  // The same plan, which reads them here.
  FLASHMOE_DEVICE core::Plan in_shared(core::Plan plan) {
    plan.kept = kept;
    plan.first_row = first_row;
    return plan;
  }
};

// What the communication warps of a CTA share.
struct CommShared {
  int32_t count[kMaxExperts];   // rows of each expert: of this CTA, later of the whole PE
  int32_t before[kMaxExperts];  // rows of each expert that earlier CTAs have
  int32_t start[kMaxExperts];   // where those of each expert begin in the PE's list
  bool ok[kMaxCommWarps];
};

template <int kCommWarps>
struct CommGroup {
  static_assert(kCommWarps <= kMaxCommWarps);
  static constexpr int kWarps = kCommWarps;
  static constexpr int kThreads = kWarps * device::kWarpSize;

  const Context& context;
  CommShared& shared;
  PlanShared& plan_shared;
  int32_t thread;  // 0 to kThreads - 1

  FLASHMOE_DEVICE int32_t warp() const { return thread / device::kWarpSize; }
  FLASHMOE_DEVICE int32_t lane() const { return thread % device::kWarpSize; }
  // This warp among all communication warps of the PE.
  FLASHMOE_DEVICE int32_t warp_of_pe() const { return context.cta * kWarps + warp(); }
  FLASHMOE_DEVICE int32_t warps_of_pe() const { return context.arguments.ctas * kWarps; }

  // The tokens of this CTA: a contiguous piece, so that slots keep their order.
  FLASHMOE_DEVICE int32_t tokens_per_cta() const {
    return static_cast<int32_t>(core::ceil_div(context.shape().tokens, context.arguments.ctas));
  }
  FLASHMOE_DEVICE int32_t first_token() const {
    const int32_t token = context.cta * tokens_per_cta();
    return token < context.shape().tokens ? token : context.shape().tokens;
  }
  FLASHMOE_DEVICE int32_t last_token() const {
    const int32_t token = first_token() + tokens_per_cta();
    return token < context.shape().tokens ? token : context.shape().tokens;
  }

  FLASHMOE_DEVICE core::Plan plan() const { return plan_shared.in_shared(context.plan()); }

  FLASHMOE_DEVICE void sync() const { device::barrier_sync(device::Barrier::kComm, kThreads); }

  // Calls f(i) for first <= i < last, each i in one thread.
  template <typename F>
  FLASHMOE_DEVICE void for_each(int32_t first, int32_t last, const F& f) const {
    for (int32_t i = first + thread; i < last; i += kThreads) f(i);
  }

  // A barrier of the group; whether `ok` holds in all its threads.
  FLASHMOE_DEVICE bool all_ok(bool ok) const {
    const bool warp_ok = device::all(ok);
    if (lane() == 0) shared.ok[warp()] = warp_ok;
    sync();
    bool result = true;
    for (int i = 0; i < kWarps; ++i) result = result && shared.ok[i];
    sync();
    return result;
  }

  // The n-th barrier of all CTAs of the PE, n from 1; false if the PE has failed. Everything before
  // it in any CTA is visible to all of them after it.
  FLASHMOE_DEVICE bool pe_barrier(uint32_t n, bool ok) const {
    using device::Scope;
    ok = all_ok(ok);
    if (ok && thread == 0) {
      uint32_t* arrivals = &context.control()->barrier;
      device::fetch_add_acquire_release<Scope::kGpu>(arrivals, 1u);
      const uint64_t expected = uint64_t{n} * static_cast<uint32_t>(context.arguments.ctas);
      ok = wait_for_count<Scope::kGpu>(context, arrivals, expected, Failure::kBarrier, n);
    }
    return all_ok(ok);
  }
};

}  // namespace flashmoe::cuda
