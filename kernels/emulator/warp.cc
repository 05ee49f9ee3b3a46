// Barriers of a CTA and what the 32 lanes of a warp do together.
#include <bit>
#include <cstring>

#include "kernels/emulator/machine.h"
#include "kernels/emulator/tensor_core.h"

namespace flashmoe::emulator {

int thread_index() { return machine->current->index; }
int gpu_index() { return machine->block_of(*machine->current).gpu; }
int block_index() { return machine->block_of(*machine->current).index; }
int block_count() {
  const Machine& m = *machine;
  return m.launch.grid_per_gpu ? m.gpus[static_cast<size_t>(gpu_index())].blocks : m.launch.blocks;
}
int block_threads() { return machine->launch.threads; }
std::byte* shared_memory() { return machine->memory.shared(machine->current->block); }

void barrier_sync(int barrier, int threads) {
  Thread& thread = begin_hook("barrier_sync", __builtin_return_address(0));
  Machine& m = *machine;
  const auto misuse = [&](const std::string& what) {
    m.fail("barrier misuse: " + m.who(thread) + " comes to barrier " + std::to_string(barrier) +
           " of " + std::to_string(threads) + " threads, " + what);
  };
  if (barrier < 0 || barrier >= 16) misuse("but there are barriers 0 to 15");
  if (threads <= 0 || threads % kWarpSize != 0 || threads > m.launch.threads) {
    misuse("but the CTA has " + std::to_string(m.launch.threads) + " in warps of 32");
  }
  NamedBarrier& b = m.block_of(thread).barriers[static_cast<size_t>(barrier)];
  if (!b.arrived.empty() && b.expected != threads) {
    misuse("where " + m.who(*b.arrived[0]) + " waits for " + std::to_string(b.expected));
  }
  b.expected = threads;
  b.arrived.push_back(&thread);
  thread.barrier = barrier;
  thread.unproductive = 0;
  if (static_cast<int>(b.arrived.size()) < threads) {
    m.block(Wait::kBarrier);
    return;
  }
  m.progress();
  // The hardware counts warps: all lanes must be among those who came.
  std::array<int, 32> lanes{};
  for (const Thread* t : b.arrived) ++lanes[static_cast<size_t>(t->index / kWarpSize)];
  View view;
  for (size_t warp = 0; warp < lanes.size(); ++warp) {
    if (lanes[warp] != 0 && lanes[warp] != kWarpSize) {
      misuse("which is full although only " + std::to_string(lanes[warp]) + " lanes of warp " +
             std::to_string(warp) + " came");
    }
  }
  std::vector<Thread*> arrived;
  arrived.swap(b.arrived);
  for (const Thread* t : arrived) m.add(view, t->view);
  for (size_t i = 0; i < lanes.size(); ++i) {
    if (lanes[i] == 0) continue;
    Warp& warp = m.warps[static_cast<size_t>(thread.block * m.launch.threads / kWarpSize) + i];
    view.seen = m.clocks.with_warp(view.seen, static_cast<size_t>(warp.index), warp.epochs);
    ++warp.epochs;
  }
  for (Thread* t : arrived) {
    t->view = view;
    t->epoch = m.warp_of(*t).epochs;
    if (t != &thread) m.make_ready(*t);
  }
}

namespace {

Thread* lane_of_warp(Machine& m, const Warp& warp, int lane) {
  return &m.threads[static_cast<size_t>(warp.index * kWarpSize + lane)];
}

// Comes to an operation of all lanes. True for the last one, which carries it out and then calls
// leave_together; the others return after that.
bool come_together(Machine& m, Thread& thread, WarpOperation operation, uint32_t variant) {
  Warp& warp = m.warp_of(thread);
  const auto misuse = [&](const std::string& what) {
    m.fail("warp misuse: " + m.who(thread) + " is at " + thread.doing + what);
  };
  if (warp.ended) {
    misuse(", but lane " + std::to_string(std::countr_zero(warp.ended)) + " has ended");
  }
  if (warp.arrived != 0 && (warp.operation != operation || warp.variant != variant)) {
    const int other = std::countr_zero(warp.arrived);
    misuse(", but lane " + std::to_string(other) + " is at " + lane_of_warp(m, warp, other)->doing +
           (warp.operation == operation ? " with other arguments" : ""));
  }
  warp.operation = operation;
  warp.variant = variant;
  warp.arrived |= 1u << Machine::lane_of(thread);
  if (warp.arrived == ~0u) return true;
  m.block(Wait::kWarp);
  return false;
}

void leave_together(Machine& m, Thread& thread) {
  Warp& warp = m.warp_of(thread);
  warp.operation = WarpOperation::kNone;
  warp.arrived = 0;
  for (int i = 0; i < kWarpSize; ++i) {
    Thread* lane = lane_of_warp(m, warp, i);
    if (lane != &thread) m.make_ready(*lane);
  }
}

// Gives `value` to the others; the values of all lanes are in `warp.values` until one of them comes
// to the next operation, which is why results are computed before leaving.
template <typename F>
uint32_t exchange(const char* name, const void* place, WarpOperation operation, uint32_t value,
                  uint32_t source, F result) {
  Thread& thread = begin_hook(name, place);
  Machine& m = *machine;
  Warp& warp = m.warp_of(thread);
  const size_t lane = static_cast<size_t>(Machine::lane_of(thread));
  warp.values[lane] = value;
  warp.sources[lane] = source;
  if (come_together(m, thread, operation, 0)) {
    std::array<uint32_t, kWarpSize> results;
    for (size_t i = 0; i < kWarpSize; ++i) results[i] = result(warp, i);
    for (size_t i = 0; i < kWarpSize; ++i) {
      lane_of_warp(m, warp, static_cast<int>(i))->result = results[i];
    }
    leave_together(m, thread);
  }
  return thread.result;
}

}  // namespace

void warp_sync() {
  Thread& thread = begin_hook("warp_sync", __builtin_return_address(0));
  Machine& m = *machine;
  if (!come_together(m, thread, WarpOperation::kSync, 0)) return;
  m.sync_warp(m.warp_of(thread));
  leave_together(m, thread);
}

uint32_t shuffle(uint32_t value, int source) {
  if (source < 0 || source >= kWarpSize) {
    machine->fail("warp misuse: " + machine->who(*machine->current) + " shuffles from lane " +
                  std::to_string(source));
  }
  return exchange("shuffle", __builtin_return_address(0), WarpOperation::kShuffle, value,
                  static_cast<uint32_t>(source),
                  [](const Warp& warp, size_t lane) { return warp.values[warp.sources[lane]]; });
}

uint32_t ballot(bool predicate) {
  return exchange("ballot", __builtin_return_address(0), WarpOperation::kBallot, predicate, 0,
                  [](const Warp& warp, size_t) {
                    uint32_t bits = 0;
                    for (size_t i = 0; i < kWarpSize; ++i) bits |= warp.values[i] << i;
                    return bits;
                  });
}

uint32_t match_any(uint32_t value) {
  return exchange("match_any", __builtin_return_address(0), WarpOperation::kMatch, value, 0,
                  [](const Warp& warp, size_t lane) {
                    uint32_t bits = 0;
                    for (size_t i = 0; i < kWarpSize; ++i) {
                      bits |= uint32_t{warp.values[i] == warp.values[lane]} << i;
                    }
                    return bits;
                  });
}

void mma_sync(MmaType type, float d[4], const uint32_t a[4], const uint32_t b[2]) {
  Thread& thread = begin_hook("mma_sync", __builtin_return_address(0));
  Machine& m = *machine;
  Warp& warp = m.warp_of(thread);
  thread.registers = {d, a, b};
  if (!come_together(m, thread, WarpOperation::kMma, static_cast<uint32_t>(type))) return;
  WarpRegisters<float, 4> all_d;
  WarpRegisters<uint32_t, 4> all_a;
  WarpRegisters<uint32_t, 2> all_b;
  for (size_t i = 0; i < kWarpSize; ++i) {
    const auto& [lane_d, lane_a, lane_b] = lane_of_warp(m, warp, static_cast<int>(i))->registers;
    std::memcpy(all_d[i].data(), lane_d, sizeof(all_d[i]));
    std::memcpy(all_a[i].data(), lane_a, sizeof(all_a[i]));
    std::memcpy(all_b[i].data(), lane_b, sizeof(all_b[i]));
  }
  mma_warp(type, all_d, all_a, all_b);
  for (size_t i = 0; i < kWarpSize; ++i) {
    std::memcpy(lane_of_warp(m, warp, static_cast<int>(i))->registers.d, all_d[i].data(),
                sizeof(all_d[i]));
  }
  leave_together(m, thread);
}

void ldmatrix(uint32_t r[4], const void* row, bool transpose) {
  Thread& thread = begin_hook("ldmatrix", __builtin_return_address(0));
  Machine& m = *machine;
  Warp& warp = m.warp_of(thread);
  const size_t offset = m.memory.offset(reinterpret_cast<uintptr_t>(row));
  m.check_bounds(offset, 16, false, true, false);
  if (offset % 16 != 0) {
    m.fail("misaligned: " + m.who(thread) + " gives ldmatrix " + m.where(offset) +
           ", which is not a multiple of 16");
  }
  m.shadow.read(offset, 16, m.accessor(thread), false);
  thread.registers = {r, row, nullptr};
  if (!come_together(m, thread, WarpOperation::kLdmatrix, transpose)) return;
  std::array<const std::byte*, kWarpSize> rows;
  for (size_t i = 0; i < kWarpSize; ++i) {
    rows[i] =
        static_cast<const std::byte*>(lane_of_warp(m, warp, static_cast<int>(i))->registers.a);
  }
  const WarpRegisters<uint32_t, 4> all = ldmatrix_warp(rows, transpose);
  for (size_t i = 0; i < kWarpSize; ++i) {
    std::memcpy(lane_of_warp(m, warp, static_cast<int>(i))->registers.d, all[i].data(),
                sizeof(all[i]));
  }
  leave_together(m, thread);
}

}  // namespace flashmoe::emulator
