// mbarriers: their phases, and what waiting for one makes known.
#include "kernels/emulator/machine.h"

namespace flashmoe::emulator {
namespace {

constexpr size_t kBarrierBytes = 8;
constexpr uint32_t kMaxArrivals = (1u << 20) - 1;
constexpr int64_t kMaxBytes = (1 << 20) - 1;

}  // namespace

Mbarrier& Machine::find_mbarrier(const void* address) {
  const size_t offset = memory.offset(reinterpret_cast<uintptr_t>(address));
  check_bounds(offset, kBarrierBytes, false, true, false);
  auto& mbarriers = block_of(*current).mbarriers;
  const auto found = mbarriers.find(offset);
  if (found == mbarriers.end()) {
    fail("mbarrier misuse: " + who(*current) + ", " + current->doing + " at " + where(offset) +
         ", which was not initialised");
  }
  Mbarrier& barrier = *found->second;
  if (!knows(*current, barrier.initialiser, barrier.initialised_epoch)) {
    fail("race: " + who(*current) + ", " + current->doing + " at " + where(offset) + ", which " +
         who(barrier.initialiser) + " initialised; nothing orders them");
  }
  return barrier;
}

void mbarrier_init(void* address, uint32_t arrivals) {
  Thread& thread = begin_hook("mbarrier_init", __builtin_return_address(0));
  Machine& m = *machine;
  const size_t offset = m.memory.offset(reinterpret_cast<uintptr_t>(address));
  m.check_bounds(offset, kBarrierBytes, true, true, false);
  const auto misuse = [&](const std::string& what) {
    m.fail("mbarrier misuse: " + m.who(thread) + " initialises " + m.where(offset) + what);
  };
  if (offset % kBarrierBytes != 0) misuse(", which is not a multiple of 8");
  if (arrivals == 0 || arrivals > kMaxArrivals) {
    misuse(" for " + std::to_string(arrivals) + " arrivals");
  }
  std::unique_ptr<Mbarrier>& barrier = m.block_of(thread).mbarriers[offset];
  if (barrier) misuse(", which is an mbarrier already");
  m.shadow.write(offset, kBarrierBytes, m.accessor(thread));
  m.shadow.set_barrier(offset, kBarrierBytes);
  barrier = std::make_unique<Mbarrier>();
  barrier->offset = offset;
  barrier->block = thread.block;
  barrier->agent = m.new_agent({Agent::Kind::kCopies, thread.block, offset});
  barrier->arrivals = barrier->pending = arrivals;
  barrier->initialiser = thread.id;
  barrier->initialised_epoch = thread.epoch;
  m.next_epoch(thread);
}

void fence_mbarrier_init() {
  Thread& thread = begin_hook("fence_mbarrier_init", __builtin_return_address(0));
  for (auto& [offset, barrier] : machine->block_of(thread).mbarriers) {
    if (barrier->initialiser == thread.id) barrier->fenced = true;
  }
}

void mbarrier_invalidate(void* address) {
  Thread& thread = begin_hook("mbarrier_invalidate", __builtin_return_address(0));
  Machine& m = *machine;
  Mbarrier& barrier = m.find_mbarrier(address);
  if (barrier.pending != barrier.arrivals || barrier.bytes != 0 || !barrier.waiters.empty()) {
    m.fail("mbarrier misuse: " + m.who(thread) + " invalidates " + m.where(barrier.offset) +
           ", which is in use");
  }
  const size_t offset = barrier.offset;
  m.shadow.clear_barrier(offset, kBarrierBytes);
  m.shadow.write(offset, kBarrierBytes, m.accessor(thread));
  m.block_of(thread).mbarriers.erase(offset);
}

void Machine::try_complete(Mbarrier& barrier) {
  if (barrier.pending != 0) return;
  if (barrier.bytes < 0) {
    fail("mbarrier misuse: " + std::to_string(-barrier.bytes) +
         " bytes more than expected were copied to " + where(barrier.offset));
  }
  if (barrier.bytes != 0) return;
  // Copies of this phase become known.
  barrier.arrived.seen =
      clocks.with(barrier.arrived.seen, barrier.agent, shadow.base() + 1 + barrier.phase);
  barrier.done = barrier.arrived;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  std::vector<Thread*> waiters;
  waiters.swap(barrier.waiters);
  for (Thread* waiter : waiters) {
    acquire(*waiter, barrier.done);
    make_ready(*waiter);
  }
  progress();
}

void Machine::arrive(Mbarrier& barrier) {
  if (barrier.pending == 0) {
    fail("mbarrier misuse: more arrivals than the " + std::to_string(barrier.arrivals) +
         " of a phase at " + where(barrier.offset));
  }
  --barrier.pending;
  progress();
  try_complete(barrier);
}

void Machine::complete_bytes(Mbarrier& barrier, int64_t bytes) {
  barrier.bytes -= bytes;
  if (barrier.bytes < -kMaxBytes) {
    fail("mbarrier misuse: too many bytes copied to " + where(barrier.offset));
  }
  try_complete(barrier);
}

void mbarrier_arrive(void* address, uint32_t expected_bytes) {
  Thread& thread = begin_hook("mbarrier_arrive", __builtin_return_address(0));
  Machine& m = *machine;
  Mbarrier& barrier = m.find_mbarrier(address);
  thread.unproductive = 0;
  barrier.bytes += expected_bytes;
  if (barrier.bytes > kMaxBytes) {
    m.fail("mbarrier misuse: " + m.who(thread) + " makes " + m.where(barrier.offset) + " expect " +
           std::to_string(barrier.bytes) + " bytes, more than 2^20 - 1");
  }
  m.add(barrier.arrived, m.snapshot(thread));
  m.arrive(barrier);
}

bool mbarrier_test(void* address, uint32_t parity) {
  Thread& thread = begin_hook("mbarrier_test", __builtin_return_address(0));
  Machine& m = *machine;
  Mbarrier& barrier = m.find_mbarrier(address);
  if ((barrier.phase & 1) == parity) {
    // The hardware too may suspend the thread for some time.
    m.looked();
    if ((barrier.phase & 1) == parity) return false;
  }
  thread.unproductive = 0;
  m.acquire(thread, barrier.done);
  return true;
}

void mbarrier_wait(void* address, uint32_t parity) {
  Thread& thread = begin_hook("mbarrier_wait", __builtin_return_address(0));
  Machine& m = *machine;
  Mbarrier& barrier = m.find_mbarrier(address);
  if (parity > 1) {
    m.fail("mbarrier misuse: " + m.who(thread) + " waits for parity " + std::to_string(parity) +
           " at " + m.where(barrier.offset));
  }
  thread.unproductive = 0;
  if ((barrier.phase & 1) != parity) {
    m.acquire(thread, barrier.done);
    return;
  }
  thread.mbarrier = &barrier;
  thread.parity = parity;
  barrier.waiters.push_back(&thread);
  m.block(Wait::kMbarrier);
}

}  // namespace flashmoe::emulator
