// What every role of the kernel knows: the launch, its PE, its CTA, and the memory of the PE by
// name, so that no role does offset arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/core/epoch.h"
#include "kernels/core/heap_layout.h"
#include "kernels/core/plan.h"
#include "kernels/core/tile_order.h"
#include "kernels/cuda/arguments.h"
#include "kernels/device/identity.h"
#include "kernels/device/memory_order.h"

namespace flashmoe::cuda {

struct Context {
  const KernelArguments& arguments;
  const PeArguments& pe;
  int32_t local;  // which of the PEs of this launch
  int32_t rank;   // of the PE in its group
  int32_t cta;    // of the PE's CTAs
  uint32_t epoch;

  FLASHMOE_DEVICE const core::Shape& shape() const { return arguments.shape; }

  // The place in the heap of any PE.
  template <typename T>
  FLASHMOE_DEVICE T* heap(int32_t of, const core::Section& section) const {
    return reinterpret_cast<T*>(arguments.heaps[of] + section.offset);
  }
  template <typename T>
  FLASHMOE_DEVICE T* workspace(const core::Section& section) const {
    return reinterpret_cast<T*>(pe.workspace + section.offset);
  }

  FLASHMOE_DEVICE Control* control() const {
    return workspace<Control>(arguments.workspace.control);
  }
  // Row counts that PE `source` has put into the heap of PE `of` in this epoch, [E].
  FLASHMOE_DEVICE int32_t* counts(int32_t of, int32_t source) const {
    const core::Shape& s = shape();
    const int32_t row = core::parity(epoch) * s.num_pes + source;
    return heap<int32_t>(of, arguments.heap.counts) + int64_t{row} * s.num_experts;
  }
  FLASHMOE_DEVICE uint64_t* counted(int32_t of, int32_t source) const {
    return heap<uint64_t>(of, arguments.heap.counted) + core::parity(epoch) * shape().num_pes +
           source;
  }
  FLASHMOE_DEVICE uint64_t* arrived(int32_t of, int32_t block) const {
    return heap<uint64_t>(of, arguments.heap.arrived) + block;
  }
  FLASHMOE_DEVICE uint64_t* came_back(int32_t of, int32_t token) const {
    return heap<uint64_t>(of, arguments.heap.came_back) + token;
  }
  FLASHMOE_DEVICE uint32_t* first_done(int32_t block) const {
    return workspace<uint32_t>(arguments.workspace.first_done) + block;
  }
  FLASHMOE_DEVICE const core::Plan plan() const {
    return core::Plan{
        .shape = arguments.shape,
        .counts = counts(rank, 0),
        .start = workspace<int32_t>(arguments.workspace.start),
        .kept = workspace<int32_t>(arguments.workspace.kept),
        .first_row = workspace<int32_t>(arguments.workspace.first_row),
        .cap = 0,
    };
  }

  // Orders what this thread and those it has synchronised with wrote before the signals that it
  // sends after it, for readers on whichever GPU the PEs are.
  FLASHMOE_DEVICE void fence_before_signal() const {
    if (arguments.remote) {
      device::fence<device::Scope::kSystem>();
    } else {
      device::fence<device::Scope::kGpu>();
    }
  }
};

}  // namespace flashmoe::cuda
