// The persistent kernel: one launch per epoch, one CTA per SM, roles per warp in every CTA.
//
//   communication warps   route, publish, plan, dispatch
//   producer warps        take tiles, wait for what they need, load it
//   math warps            multiply; activation; results put to where the tokens came from
//
// A warp that is done with its role combines.
//
// docs/kernel.md walks through it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/arguments.h"
#include "kernels/cuda/combine.h"
#include "kernels/cuda/comm_group.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/dispatch.h"
#include "kernels/cuda/expert.h"
#include "kernels/cuda/gate.h"
#include "kernels/cuda/route.h"
#include "kernels/cuda/tiles.h"
#include "kernels/cuda/transport.h"
#include "kernels/device/barrier.h"
#include "kernels/device/mbarrier.h"
#include "kernels/device/registers.h"
#include "kernels/device/warp.h"

namespace flashmoe::cuda {

// What a CTA is for.
struct Place {
  int32_t local;  // which of the PEs of this launch
  int32_t cta;    // of the PE's CTAs
  uint32_t epoch;
  TokenRange tokens;  // that it routes
};

template <typename Engine>
struct KernelShared {
  typename Engine::Shared engine;
  Staging<Engine> staging[Engine::kMathWarps];
  CommShared comm;
  PlanShared plan;
  TileRing ring;
  Place place;
  device::Mbarrier planned;  // the plan is made, or the PE has failed
  bool ok;                   // at the start of the launch
};

// Registers that a launch gives to each thread of the only CTA of a multiprocessor: 64 K of them,
// in groups of 8, as ptxas has them by __launch_bounds__.
constexpr int registers_of(int threads) { return 65536 / threads / 8 * 8; }

template <typename Engine, typename Transport>
struct Kernel {
  using Element = typename Engine::Element;
  using Shared = KernelShared<Engine>;
  using Comm = CommGroup<Engine::kCommWarps>;

  static constexpr int kFirstMathWarp = Engine::kCommWarps + Engine::kProducerWarps;
  static_assert(kFirstMathWarp % 4 == 0, "math warps are whole warpgroups");
  static_assert(sizeof(Shared) <= Engine::kSharedLimit, "no launch has so much shared memory");

  static constexpr int kPieces = Tiles<Engine, Transport>::kPiecesOfRow;

  // Registers of a thread where they can be moved between warpgroups. The launch gives all threads
  // the same number; what the other roles do not need goes to the math warps. Functions of another
  // library may need more than is left to their callers, so it is not done with those of NVSHMEM.
  static constexpr bool kMovesRegisters = Engine::kMovesRegisters && !Transport::kNetwork;
  static constexpr int kOtherRegisters = 104;
  static constexpr int kMathRegisters = 200;
  static_assert(!kMovesRegisters ||
                    kFirstMathWarp * kOtherRegisters + Engine::kMathWarps * kMathRegisters <=
                        Engine::kThreads / device::kWarpSize * registers_of(Engine::kThreads),
                "a math warp would wait for ever for registers that nobody gives back");

  const KernelArguments& arguments;
  Shared& shared;

  FLASHMOE_DEVICE void run() const {
    if (device::thread_index() == 0) enter();
    device::block_sync();
    if (shared.ok) {
      if (arguments.routes) run_gate();
      if (device::thread_index() == 0) init();
      device::block_sync();
      const bool ok = run_roles();
      if (!kMovesRegisters && ok) combine_tokens(this->context());
    }
    device::block_sync();
    if (device::warp_index() == 0) leave();
  }

 private:
  // Read by each phase anew, so that it takes no registers in the others.
  FLASHMOE_DEVICE Context context() const {
    const Place& place = shared.place;
    return Context{
        .arguments = arguments,
        .pe = arguments.pes[place.local],
        .local = place.local,
        .rank = arguments.first_pe + place.local,
        .cta = place.cta,
        .epoch = place.epoch,
    };
  }

  FLASHMOE_DEVICE void enter() const {
    Place& place = shared.place;
    place.local = device::block_index() / arguments.ctas;
    place.cta = device::block_index() % arguments.ctas;
    place.epoch = context().control()->epoch + 1;
    const Context context = this->context();
    const Comm group = comm_group(context);
    place.tokens = {group.first_token(), group.last_token()};
    shared.ok = !has_failed(context);
  }

  FLASHMOE_DEVICE Comm comm_group(const Context& context) const {
    return Comm{context, shared.comm, shared.plan, device::thread_index()};
  }

  FLASHMOE_DEVICE void run_gate() const {
    gate<Element, Engine::kThreads>(arguments.gates[shared.place.local], shared.place.tokens,
                                    reinterpret_cast<std::byte*>(&shared),
                                    sizeof(typename Engine::Shared));
  }

  FLASHMOE_DEVICE void init() const {
    Engine::init(shared.engine);
    for (int i = 0; i < kTilesAhead; ++i) {
      device::mbarrier_init(&shared.ring.announced[i], 1);
      device::mbarrier_init(&shared.ring.taken[i], Engine::kProducerWarps - 1 + Engine::kMathWarps);
    }
    device::mbarrier_init(&shared.planned, Comm::kThreads);
    device::fence_mbarrier_init();
  }

  // False if the PE has failed. Where registers are moved each role combines by itself: code that
  // all of them share would be limited to the registers of those that have the fewest.
  FLASHMOE_DEVICE bool run_roles() const {
    const int warp = device::warp_index();
    const Context context = this->context();
    const Tiles<Engine, Transport> tiles{context};
    if (warp >= kFirstMathWarp) {
      if constexpr (kMovesRegisters) device::take_registers<kMathRegisters>();
      MathRole<Engine, Transport>{tiles, shared.engine, shared.ring, shared.staging}.run();
      const bool ok = shared.ok;
      if (kMovesRegisters && ok) combine_tokens(context);
      return ok;
    } else {
      if constexpr (kMovesRegisters) device::keep_registers<kOtherRegisters>();
      bool ok = true;
      if (warp < Engine::kCommWarps) {
        ok = communicate(context);
      } else {
        device::mbarrier_wait(&shared.planned, 0);
        ok = shared.ok;
        TileProducer<Engine, Transport>{tiles, shared.engine, shared.ring, shared.plan}.run(
            warp - Engine::kCommWarps, ok);
      }
      if (kMovesRegisters && ok) combine_tokens(context);
      return ok;
    }
  }

  // False if the PE has failed.
  FLASHMOE_DEVICE bool communicate(const Context& context) const {
    const Comm group = comm_group(context);
    const bool ok = route_and_plan<Transport>(group);
    if (group.thread == 0 && !ok) shared.ok = false;
    // By every thread, for what it wrote of the plan.
    device::mbarrier_arrive(&shared.planned);
    if (!ok) return false;
    dispatch<Transport>(group);
    if constexpr (Transport::kNetwork) {
      const auto pieces = static_cast<uint32_t>(context.shape().hidden_tiles()) * kPieces;
      return Transport::put_results(group, pieces);
    }
    return true;
  }

  FLASHMOE_DEVICE void combine_tokens(const Context& context) const {
    const core::Plan plan = shared.plan.in_shared(context.plan());
    combine<Element, kPieces, Transport>(context, plan, device::warp_index(),
                                         Engine::kThreads / device::kWarpSize);
  }

  // The last CTA of the PE leaves everything as the next launch expects it. By one warp.
  FLASHMOE_DEVICE void leave() const {
    using device::Scope;
    const Context context = this->context();
    Control* control = context.control();
    const int lane = device::lane_index();
    uint32_t before = 0;
    if (lane == 0) {
      before = device::fetch_add_acquire_release<Scope::kGpu>(&control->exits, 1u);
    }
    device::warp_sync();
    if (device::shuffle(before, 0) + 1 != static_cast<uint32_t>(context.arguments.ctas)) return;
    if (has_failed(context)) {
      poison(context);
    } else {
      const int64_t blocks = context.shape().row_blocks();
      for (int64_t i = lane; i < blocks; i += device::kWarpSize) {
        // Atomically, since nothing but a wait for their values orders the additions before.
        const auto block = static_cast<int32_t>(i);
        device::store_relaxed<Scope::kSystem>(context.arrived(context.rank, block), uint64_t{0});
        device::store_relaxed<Scope::kGpu>(context.first_done(block), 0u);
      }
      if constexpr (Transport::kNetwork) {
        Transport::reset(context, lane, device::kWarpSize);
      }
    }
    if (lane == 0) {
      control->epoch = context.epoch;
      control->barrier = 0;
      control->exits = 0;
      control->ticket = 0;
    }
  }

  // All results of a failed PE: y and what the gate answers are NaN, and no token has an expert.
  FLASHMOE_DEVICE void poison(const Context& context) const {
    const core::Shape& shape = context.shape();
    const float nan = device::not_a_number();
    fill(static_cast<Element*>(context.pe.y), int64_t{shape.tokens} * shape.hidden,
         device::from_float<Element>(nan));
    fill(context.pe.dropped, 1, 0);
    if (!arguments.routes) return;
    const GateArguments& gate = arguments.gates[context.local];
    fill(gate.logits, int64_t{shape.tokens} * shape.num_experts, nan);
    fill(gate.weights, shape.slots(), nan);
    fill(gate.indices, shape.slots(), -1);
  }

  template <typename T>
  FLASHMOE_DEVICE static void fill(T* values, int64_t count, T value) {
    for (int64_t i = device::lane_index(); i < count; i += device::kWarpSize) values[i] = value;
  }
};

// By every thread of a launch of arguments.ctas CTAs for each of its PEs.
template <typename Engine, typename Transport>
FLASHMOE_DEVICE void run_kernel(const KernelArguments& arguments) {
  if (arguments.pes[device::block_index() / arguments.ctas].absent) return;
  auto& shared = *reinterpret_cast<KernelShared<Engine>*>(device::shared_memory());
  Kernel<Engine, Transport>{arguments, shared}.run();
}

}  // namespace flashmoe::cuda
