// The end of a kernel, and what the next one of a GPU's stream finds.
#include <bit>

#include "kernels/emulator/machine.h"
#include "kernels/emulator/wgmma.h"

namespace flashmoe::emulator {

void Machine::end_kernel(Thread& thread) {
  Warp& warp = warp_of(thread);
  if (warp.operation != WarpOperation::kNone) {
    fail(who(thread) + " ends while other lanes of its warp are at " +
         threads[static_cast<size_t>(warp.index * kWarpSize + std::countr_zero(warp.arrived))]
             .doing +
         ", which needs all 32");
  }
  if (launch.threads % kWarpgroupSize != 0) return;
  const std::unique_ptr<Warpgroup>& group = warpgroups[thread.id / kWarpgroupSize];
  if (!group) return;
  for (const Accumulators& accumulators : group->in_flight) {
    if (!accumulators.registers[static_cast<size_t>(thread.index % kWarpgroupSize)]) continue;
    fail("wgmma misuse: " + who(thread) + " ends while its accumulators are in flight");
  }
}

void Machine::begin_next_kernel(Gpu& gpu) {
  View all;
  for (Thread* thread : gpu.waiting) {
    if (lane_of(*thread) == 0) sync_warp(warp_of(*thread));
  }
  for (Thread* thread : gpu.waiting) {
    if (lane_of(*thread) == 0) add(all, thread->view);
  }
  all.visible_to_async = all.seen;
  for (Thread* thread : gpu.waiting) {
    thread->view = all;
    for (View& view : thread->observed) view = {};
    for (View& view : thread->released) view = {};
    if (thread->index != 0) continue;
    for (auto& [offset, barrier] : block_of(*thread).mbarriers) {
      if (barrier->bytes != 0 || barrier->arriving != 0) {
        fail("mbarrier misuse: block " + std::to_string(thread->block) + " ends while copies to " +
             where(offset) + " are in flight");
      }
      retired.push_back(std::move(barrier));
    }
    block_of(*thread).mbarriers.clear();
    memory.reset_shared(thread->block, launch.shared_bytes);
  }
  for (Thread* thread : gpu.waiting) {
    if (thread != current) make_ready(*thread);
  }
  gpu.waiting.clear();
  progress();
}

void next_kernel() {
  Thread& thread = begin_hook("next_kernel", __builtin_return_address(0));
  Machine& m = *machine;
  m.end_kernel(thread);
  Gpu& gpu = m.gpus[static_cast<size_t>(m.block_of(thread).gpu)];
  gpu.waiting.push_back(&thread);
  if (gpu.waiting.size() < static_cast<size_t>(gpu.threads)) {
    m.block(Wait::kNextKernel);
  } else {
    m.begin_next_kernel(gpu);
  }
}

}  // namespace flashmoe::emulator
