// The persistent kernel: one launch per epoch, one CTA per SM, roles per warp in every CTA.
//
//   communication warps   route, publish, plan, dispatch, and at the end combine
//   producer warps        take tiles, wait for what they need, load it
//   math warps            multiply; activation; results put to where the tokens came from
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
#include "kernels/device/barrier.h"
#include "kernels/device/mbarrier.h"
#include "kernels/device/registers.h"

namespace flashmoe::cuda {

template <typename Engine>
struct KernelShared {
  typename Engine::Shared engine;
  Staging<Engine> staging[Engine::kMathWarps];
  CommShared comm;
  TileRing ring;
  device::Mbarrier planned;  // the plan is made, or the PE has failed
  bool ok;                   // at the start of the launch
  bool last;                 // this CTA is the last of its PE to end
};

template <typename Engine>
struct Kernel {
  using Element = typename Engine::Element;
  using Shared = KernelShared<Engine>;
  using Comm = CommGroup<Engine::kCommWarps>;

  static constexpr int kFirstMathWarp = Engine::kCommWarps + Engine::kProducerWarps;
  static_assert(kFirstMathWarp % 4 == 0, "math warps are whole warpgroups");

  // Registers of a thread where they can be moved between warpgroups. The launch gives all threads
  // the same number; what the other roles do not need goes to the math warps.
  static constexpr int kOtherRegisters = 88;
  static constexpr int kMathRegisters = 208;

  const Context& context;
  Shared& shared;

  FLASHMOE_DEVICE void run() const {
    if (device::thread_index() == 0) shared.ok = !has_failed(context);
    device::block_sync();
    if (shared.ok) {
      if (context.arguments.routes) run_gate();
      init();
      device::block_sync();
      run_roles();
    }
    device::block_sync();
    leave();
  }

 private:
  FLASHMOE_DEVICE Comm comm_group() const {
    return Comm{context, shared.comm, device::thread_index()};
  }

  FLASHMOE_DEVICE void run_gate() const {
    const Comm group = comm_group();
    gate<Element, Engine::kThreads>(context.arguments.gates[context.local], group.first_token(),
                                    group.last_token(), reinterpret_cast<std::byte*>(&shared),
                                    sizeof(typename Engine::Shared));
  }

  FLASHMOE_DEVICE void init() const {
    if (device::thread_index() != 0) return;
    Engine::init(shared.engine);
    for (int i = 0; i < kTilesAhead; ++i) {
      device::mbarrier_init(&shared.ring.announced[i], 1);
      device::mbarrier_init(&shared.ring.taken[i], Engine::kProducerWarps - 1 + Engine::kMathWarps);
    }
    device::mbarrier_init(&shared.planned, 1);
    device::fence_mbarrier_init();
  }

  FLASHMOE_DEVICE void run_roles() const {
    const int warp = device::warp_index();
    const Tiles<Engine> tiles{context};
    if (warp >= kFirstMathWarp) {
      if constexpr (Engine::kMovesRegisters) device::take_registers<kMathRegisters>();
      const int math_warp = warp - kFirstMathWarp;
      MathRole<Engine>{tiles, shared.engine, shared.ring, shared.staging[math_warp], math_warp}
          .run();
    } else {
      if constexpr (Engine::kMovesRegisters) device::keep_registers<kOtherRegisters>();
      if (warp < Engine::kCommWarps) {
        communicate();
      } else {
        device::mbarrier_wait(&shared.planned, 0);
        TileProducer<Engine>{tiles, shared.engine, shared.ring}.run(warp - Engine::kCommWarps,
                                                                    shared.ok);
      }
    }
  }

  FLASHMOE_DEVICE void communicate() const {
    const Comm group = comm_group();
    const bool ok = route_and_plan(group);
    if (group.thread == 0) {
      if (!ok) shared.ok = false;
      device::mbarrier_arrive(&shared.planned);
    }
    if (!ok) return;
    dispatch(group);
    combine<Element, Tiles<Engine>::kPiecesOfRow>(group);
  }

  // The last CTA of the PE leaves everything as the next launch expects it.
  FLASHMOE_DEVICE void leave() const {
    using device::Scope;
    Control* control = context.control();
    if (device::thread_index() == 0) {
      const uint32_t before = device::fetch_add_acquire_release<Scope::kGpu>(&control->exits, 1u);
      shared.last = before + 1 == static_cast<uint32_t>(context.arguments.ctas);
    }
    device::block_sync();
    if (!shared.last) return;
    if (has_failed(context)) {
      poison();
    } else {
      const int64_t blocks = context.shape().row_blocks();
      for (int64_t i = device::thread_index(); i < blocks; i += Engine::kThreads) {
        // Atomically, since nothing but a wait for their values orders the additions before.
        const auto block = static_cast<int32_t>(i);
        device::store_relaxed<Scope::kSystem>(context.arrived(context.rank, block), uint64_t{0});
        device::store_relaxed<Scope::kGpu>(context.first_done(block), 0u);
      }
    }
    if (device::thread_index() == 0) {
      control->epoch = context.epoch;
      control->barrier = 0;
      control->exits = 0;
      control->ticket = 0;
    }
  }

  FLASHMOE_DEVICE void poison() const {
    const int64_t size = int64_t{context.shape().tokens} * context.shape().hidden;
    Element* y = static_cast<Element*>(context.pe.y);
    const Element nan = device::from_float<Element>(device::not_a_number());
    for (int64_t i = device::thread_index(); i < size; i += Engine::kThreads) y[i] = nan;
  }
};

// By every thread of a launch of arguments.ctas CTAs for each of its PEs.
template <typename Engine>
FLASHMOE_DEVICE void run_kernel(const KernelArguments& arguments) {
  const int32_t local = device::block_index() / arguments.ctas;
  const PeArguments& pe = arguments.pes[local];
  if (pe.absent) return;
  const auto* control =
      reinterpret_cast<const Control*>(pe.workspace + arguments.workspace.control.offset);
  const Context context{
      .arguments = arguments,
      .pe = pe,
      .local = local,
      .rank = arguments.first_pe + local,
      .cta = device::block_index() % arguments.ctas,
      .epoch = control->epoch + 1,
  };
  auto& shared = *reinterpret_cast<KernelShared<Engine>*>(device::shared_memory());
  Kernel<Engine>{context, shared}.run();
}

}  // namespace flashmoe::cuda
