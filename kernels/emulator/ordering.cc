// What threads know of each other's accesses, and the hooks that pass it on: atomic accesses and
// fences.
//
// An epoch of a thread ends when what it did so far is passed on, so that what it does later is not
// part of that.
#include <cstring>

#include "kernels/emulator/machine.h"

namespace flashmoe::emulator {

void Machine::next_epoch(Thread& thread) { thread.epoch = ++warp_of(thread).epochs; }

View Machine::snapshot(Thread& thread) {
  View view{clocks.with(thread.view.seen, thread.id, thread.epoch), thread.view.visible_to_async};
  thread.view.seen = view.seen;
  next_epoch(thread);
  return view;
}

void Machine::add(View& view, const View& other) {
  clocks.add(view.seen, other.seen);
  clocks.add(view.visible_to_async, other.visible_to_async);
}

void Machine::acquire(Thread& thread, const View& view) { add(thread.view, view); }

bool Machine::knows(const Thread& thread, Id id, uint32_t epoch) const {
  return epoch <= shadow.base() || id == thread.id ||
         clocks.knows(thread.view.seen.get(), id, epoch);
}

void Machine::sync_warp(Warp& warp) {
  Thread* lanes = &threads[static_cast<size_t>(warp.index * kWarpSize)];
  View view;
  for (int i = 0; i < kWarpSize; ++i) add(view, lanes[i].view);
  view.seen = clocks.with_warp(view.seen, static_cast<size_t>(warp.index), warp.epochs);
  ++warp.epochs;
  for (int i = 0; i < kWarpSize; ++i) {
    lanes[i].view = view;
    lanes[i].epoch = warp.epochs;
  }
}

Id Machine::new_agent(Agent agent) {
  if (threads.size() + agents.size() + flights.size() >= kMaxId) {
    fail("too many mbarriers and signals in one launch");
  }
  agents.push_back(agent);
  return static_cast<Id>(threads.size() + agents.size() - 1);
}

namespace {

constexpr int kGpu = static_cast<int>(Scope::kGpu), kSystem = static_cast<int>(Scope::kSystem);

bool acquires(Order order) { return order == Order::kAcquire || order == Order::kAcquireRelease; }
bool releases(Order order) { return order == Order::kRelease || order == Order::kAcquireRelease; }

// What an acquiring read of the location at that scope has observed. Both sides must have a scope
// that includes the other.
View observable(Machine& m, const Thread& thread, const AtomicLocation& location, int scope) {
  const int gpu = m.block_of(thread).gpu;
  View view;
  for (int other = 0; other < static_cast<int>(location.gpus.size()); ++other) {
    const AtomicLocation::Releases& releases = location.gpus[static_cast<size_t>(other)];
    if (other == gpu) {
      m.add(view, releases.scopes[kGpu]);
      m.add(view, releases.scopes[kSystem]);
    } else if (scope == kSystem) {
      m.add(view, releases.scopes[kSystem]);
    }
  }
  return view;
}

struct Atomic {
  Atomic(const void* address, size_t bytes, Order order_, Scope scope_, const char* name,
         const void* place)
      : m(*machine),
        thread(emulator::begin_hook(name, place)),
        order(order_),
        scope(static_cast<int>(scope_)),
        offset(m.memory.offset(reinterpret_cast<uintptr_t>(address))) {
    m.check_bounds(offset, bytes, false, false, true);
    if (offset % bytes != 0) {
      m.fail(m.who(thread) + ": " + name + " of " + std::to_string(bytes) + " bytes at " +
             m.where(offset) + ", which is not aligned to them");
    }
  }

  void read(size_t bytes) {
    m.shadow.read(offset, bytes, m.accessor(thread, true), false);
    const auto location = m.locations.find(offset);
    if (location == m.locations.end()) return;
    const View seen = observable(m, thread, location->second, scope);
    if (acquires(order)) {
      m.acquire(thread, seen);
    } else if (!seen.empty()) {
      m.add(thread.observed[kGpu],
            scope == kGpu ? seen : observable(m, thread, location->second, kGpu));
      m.add(thread.observed[kSystem], seen);
    }
  }

  // A read-modify-write goes on with the release sequence that it finds.
  void write(size_t bytes, bool modifies) {
    if (m.check_bounds(offset, bytes, true, false, true)) return;
    m.shadow.write(offset, bytes, m.accessor(thread, true));
    thread.unproductive = 0;
    m.progress();
    View released[2];
    if (releases(order)) {
      released[kGpu] = m.snapshot(thread);
      if (scope == kSystem) released[kSystem] = released[kGpu];
    } else {
      released[kGpu] = thread.released[kGpu];
      if (scope == kSystem) released[kSystem] = thread.released[kSystem];
      m.next_epoch(thread);
    }
    AtomicLocation& location = m.locations[offset];
    if (!modifies) {
      location.gpus.clear();
      location.put = {};
    }
    if (modifies && location.added_by_network) {
      m.fail("signal misuse: " + m.who(thread) + " adds atomically to " + m.where(offset) +
             ", to which puts add; neither is atomic to the other");
    }
    location.added_by_threads = modifies;
    if (!modifies) location.added_by_network = false;
    location.gpus.resize(m.gpus.size());
    AtomicLocation::Releases& mine = location.gpus[static_cast<size_t>(m.block_of(thread).gpu)];
    for (const int s : {kGpu, kSystem}) m.add(mine.scopes[s], released[s]);
  }

  Machine& m;
  Thread& thread;
  Order order;
  int scope;
  size_t offset;
};

uint64_t value_at(const void* address, size_t bytes) {
  uint64_t value = 0;
  std::memcpy(&value, address, bytes);
  return value;
}

}  // namespace

uint64_t atomic_load(const void* address, size_t bytes, Order order, Scope scope) {
  Atomic atomic(address, bytes, order, scope, "an atomic load", __builtin_return_address(0));
  atomic.m.looked();
  atomic.read(bytes);
  return value_at(address, bytes);
}

void atomic_store(void* address, size_t bytes, uint64_t value, Order order, Scope scope) {
  Atomic atomic(address, bytes, order, scope, "an atomic store", __builtin_return_address(0));
  atomic.write(bytes, false);
  std::memcpy(address, &value, bytes);
}

uint64_t atomic_add(void* address, size_t bytes, uint64_t value, Order order, Scope scope) {
  Atomic atomic(address, bytes, order, scope, "an atomic addition", __builtin_return_address(0));
  atomic.read(bytes);
  atomic.write(bytes, true);
  const uint64_t before = value_at(address, bytes);
  const uint64_t after = before + value;
  std::memcpy(address, &after, bytes);
  return before;
}

uint64_t atomic_compare_exchange(void* address, size_t bytes, uint64_t expected, uint64_t value,
                                 Order order, Scope scope) {
  Atomic atomic(address, bytes, order, scope, "an atomic compare-exchange",
                __builtin_return_address(0));
  const uint64_t before = value_at(address, bytes);
  if (before == expected) {
    atomic.read(bytes);
    atomic.write(bytes, true);
    std::memcpy(address, &value, bytes);
  } else {
    atomic.m.looked();
    atomic.read(bytes);
    return value_at(address, bytes);
  }
  return before;
}

void fence(Scope scope) {
  Thread& thread = begin_hook("a fence", __builtin_return_address(0));
  Machine& m = *machine;
  m.acquire(thread, thread.observed[kGpu]);
  if (scope == Scope::kSystem) m.acquire(thread, thread.observed[kSystem]);
  thread.released[kGpu] = m.snapshot(thread);
  if (scope == Scope::kSystem) thread.released[kSystem] = thread.released[kGpu];
}

void fence_proxy_async() {
  Thread& thread = begin_hook("fence_proxy_async", __builtin_return_address(0));
  thread.view.visible_to_async = machine->snapshot(thread).seen;
}

}  // namespace flashmoe::emulator
