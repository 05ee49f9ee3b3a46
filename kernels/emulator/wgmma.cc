#include "kernels/emulator/wgmma.h"

#include <algorithm>
#include <bit>
#include <exception>

namespace flashmoe::emulator {
namespace {

// What accumulators hold while they are in flight: a NaN that nothing computes.
constexpr uint32_t kInFlight = 0x7fe1dead;

Warpgroup& warpgroup_of(Machine& m, const Thread& thread) {
  if (m.launch.threads % kWarpgroupSize != 0) {
    m.fail("wgmma misuse: the CTA's " + std::to_string(m.launch.threads) +
           " threads are not whole warpgroups");
  }
  const size_t index = thread.id / kWarpgroupSize;
  std::unique_ptr<Warpgroup>& group = m.warpgroups[index];
  if (!group) {
    const int in_block = thread.index / kWarpgroupSize;
    group = std::make_unique<Warpgroup>(
        thread.block, in_block,
        m.new_agent({Agent::Kind::kWgmma, thread.block, static_cast<size_t>(in_block)}));
  }
  return *group;
}

// A call of one thread.
struct Call {
  Call(const char* name, const void* place)
      : thread(begin_hook(name, place)),
        m(*machine),
        group(warpgroup_of(m, thread)),
        number(static_cast<size_t>(thread.index % kWarpgroupSize)),
        lane(group.lanes[number]) {}

  [[noreturn]] void misuse(const std::string& what) const {
    m.fail("wgmma misuse: " + m.who(thread) + ", " + thread.doing + ": " + what);
  }

  Thread& thread;
  Machine& m;
  Warpgroup& group;
  size_t number;  // in the warpgroup
  Warpgroup::Lane& lane;
};

void check_untouched(const Call& call, const Accumulators& accumulators) {
  const float* registers = accumulators.registers[call.number];
  for (int i = 0; i < accumulators.columns / 2; ++i) {
    if (std::bit_cast<uint32_t>(registers[i]) == kInFlight) continue;
    call.misuse("accumulators were written before wgmma_wait");
  }
}

Accumulators* find_in_flight(const Call& call, const float* registers, int count) {
  for (Accumulators& a : call.group.in_flight) {
    const float* other = a.registers[call.number];
    if (other == nullptr) continue;
    if (other == registers && a.columns / 2 == count) return &a;
    if (other < registers + count && registers < other + a.columns / 2) {
      call.misuse("accumulators overlap others that are in flight");
    }
  }
  return nullptr;
}

// The operands must be readable by every thread that issues. The first one looks at all bytes; for
// the others, the writes that it found there are enough.
void check_operands(const Call& call, IssuedWgmma& wgmma) {
  Machine& m = call.m;
  Accessor accessor = m.accessor(call.thread);
  accessor.id = call.group.agent;
  accessor.epoch = m.shadow.base() + 1 + call.lane.committed + 1;
  accessor.async = true;
  const auto may_read = [&](const Shadow::Written& write) {
    return m.shadow.is_visible(write, accessor);
  };
  if (wgmma.issued > 0 && std::all_of(wgmma.writes.begin(), wgmma.writes.end(), may_read)) return;
  std::vector<ByteRange> ranges;
  try {
    ranges = wgmma_reads(wgmma.instruction);
  } catch (const std::exception& error) {
    call.misuse(error.what());
  }
  const size_t shared = static_cast<size_t>(call.thread.block) * Memory::kSharedStride;
  for (const ByteRange& range : ranges) {
    const size_t bytes = range.end - range.begin;
    if (range.end > m.launch.shared_bytes) {
      call.misuse("out of bounds: it reads shared memory up to " + std::to_string(range.end) +
                  ", of which the CTA has " + std::to_string(m.launch.shared_bytes) + " bytes");
    }
    m.shadow.read(shared + range.begin, bytes, accessor, false);
    m.shadow.collect(shared + range.begin, bytes, wgmma.writes);
  }
}

void multiply(Machine& m, const Warpgroup& group, const IssuedWgmma& wgmma) {
  Accumulators& accumulators = *wgmma.accumulators;
  const int columns = wgmma.instruction.columns;
  std::array<float*, kWarpgroupSize> of_thread;
  for (size_t i = 0; i < of_thread.size(); ++i) {
    of_thread[i] = accumulators.values.data() + i * static_cast<size_t>(columns) / 2;
  }
  std::vector<float> d(64 * static_cast<size_t>(columns));
  if (wgmma.accumulate) wgmma_gather(columns, of_thread, d.data());
  try {
    wgmma_multiply(wgmma.instruction, {m.memory.shared(group.block), m.launch.shared_bytes},
                   d.data());
  } catch (const std::exception& error) {
    m.fail(std::string("wgmma misuse: ") + error.what());
  }
  wgmma_scatter(columns, d.data(), of_thread);
}

void complete_groups(Machine& m, Warpgroup& group, uint32_t last) {
  if (last <= group.complete) return;
  for (; group.first < group.group_end[last]; ++group.first) {
    multiply(m, group, group.wgmmas.front());
    group.wgmmas.pop_front();
  }
  group.complete = last;
  std::vector<Thread*> waiters;
  waiters.swap(group.waiters);
  for (Thread* waiter : waiters) m.make_ready(*waiter);
}

}  // namespace

void wgmma(MmaType type, float* registers, int columns, uint64_t a_descriptor,
           uint64_t b_descriptor, bool a_transposed, bool b_transposed, bool accumulate) {
  const Call call("wgmma", __builtin_return_address(0));
  Warpgroup& group = call.group;
  if (type == MmaType::kTf32 || columns < 8 || columns > 256 || columns % 8 != 0) {
    call.misuse("there is no m64n" + std::to_string(columns) + "k16 of that type");
  }
  const WgmmaInstruction instruction{type,         columns,      a_descriptor,
                                     b_descriptor, a_transposed, b_transposed};
  Accumulators* chain = find_in_flight(call, registers, columns / 2);
  const uint64_t index = call.lane.issued++;
  if (index == group.first + group.wgmmas.size()) {
    if (!chain) {
      group.in_flight.push_back({.columns = columns, .values = {}});
      group.in_flight.back().values.resize(64 * static_cast<size_t>(columns));
    }
    group.wgmmas.push_back({instruction,
                            accumulate,
                            chain ? chain : &group.in_flight.back(),
                            chain == nullptr,
                            0,
                            {}});
    group.wgmmas.back().accumulators->last = index;
  }
  IssuedWgmma& wgmma = group.wgmmas[index - group.first];
  if (wgmma.instruction != instruction || wgmma.accumulate != accumulate ||
      (chain && chain != wgmma.accumulators) || (!chain && !wgmma.begins_chain)) {
    call.misuse("other threads of the warpgroup issued a different one as their number " +
                std::to_string(index + 1));
  }
  if (chain) {
    check_untouched(call, *chain);
  } else {
    if (!call.lane.fenced) call.misuse("wgmma_fence is missing before it");
    float* values =
        wgmma.accumulators->values.data() + call.number * static_cast<size_t>(columns) / 2;
    std::copy_n(registers, columns / 2, values);
    std::fill_n(registers, columns / 2, std::bit_cast<float>(kInFlight));
    wgmma.accumulators->registers[call.number] = registers;
  }
  check_operands(call, wgmma);
  ++wgmma.issued;
}

void wgmma_fence() {
  const Call call("wgmma_fence", __builtin_return_address(0));
  call.lane.fenced = true;
}

void wgmma_commit() {
  const Call call("wgmma_commit", __builtin_return_address(0));
  Warpgroup& group = call.group;
  const uint32_t last = ++call.lane.committed;
  if (last == group.group_end.size()) {
    group.group_end.push_back(call.lane.issued);
    group.commits.push_back(0);
  }
  if (group.group_end[last] != call.lane.issued) {
    call.misuse("other threads of the warpgroup committed a different group as their number " +
                std::to_string(last));
  }
  if (++group.commits[last] < kWarpgroupSize) return;
  Machine& m = call.m;
  group.last_completion = std::max(group.last_completion, m.now + m.delay());
  m.at(group.last_completion, [&m, &group, last] { complete_groups(m, group, last); });
}

void wgmma_wait(int pending_groups) {
  const Call call("wgmma_wait", __builtin_return_address(0));
  Machine& m = call.m;
  Warpgroup& group = call.group;
  const uint32_t pending = static_cast<uint32_t>(std::max(pending_groups, 0));
  const uint32_t last = call.lane.committed - std::min(call.lane.committed, pending);
  while (group.complete < last) {
    group.waiters.push_back(&call.thread);
    m.block(Wait::kWgmma);
  }
  if (last == 0) return;
  call.thread.view.seen =
      m.clocks.with(call.thread.view.seen, group.agent, m.shadow.base() + 1 + last);
  for (auto a = group.in_flight.begin(); a != group.in_flight.end();) {
    Accumulators& accumulators = *a++;
    float* registers = accumulators.registers[call.number];
    if (!registers || accumulators.last >= group.group_end[last]) continue;
    check_untouched(call, accumulators);
    const size_t count = static_cast<size_t>(accumulators.columns) / 2;
    std::copy_n(accumulators.values.data() + call.number * count, count, registers);
    accumulators.registers[call.number] = nullptr;
    call.lane.fenced = false;
    if (--accumulators.left == 0) {
      group.in_flight.remove_if([&](const Accumulators& other) { return &other == &accumulators; });
      a = group.in_flight.begin();
    }
  }
}

uint32_t shared_offset(const void* shared) {
  Machine& m = *machine;
  const size_t offset = m.memory.offset(reinterpret_cast<uintptr_t>(shared));
  m.check_bounds(offset, 1, false, true, false);
  return static_cast<uint32_t>(offset % Memory::kSharedStride);
}

}  // namespace flashmoe::emulator
