// Puts with signals, to PEs whose memory a GPU cannot address. What a put reads and writes is
// checked when it is issued, with an identity that nobody knows; its bytes move later, and its
// signal is updated after them. From then on they belong to an identity of the signal, which those
// who acquire_puts of the signal come to know: they see the bytes, and know that the source was
// read. Of what the issuing thread did before they see what its last fence released to the system.
// An ordinary acquire of the signal is not enough: it does not wait for what the network has still
// to write (NVSHMEM API, "Memory Ordering").
#include <algorithm>
#include <cstring>

#include "kernels/emulator/machine.h"

namespace flashmoe::emulator {
namespace {

constexpr int kSystem = static_cast<int>(Scope::kSystem);
constexpr size_t kSignalBytes = sizeof(uint64_t);

// The place at a PE that is symmetric to one of the caller's own.
size_t symmetric(const Thread& thread, const void* address, size_t bytes, int pe) {
  Machine& m = *machine;
  const std::vector<const GlobalMemory*>& memories = m.launch.symmetric;
  const auto mine = static_cast<size_t>(m.block_of(thread).gpu);
  const auto at = static_cast<const std::byte*>(address);
  const size_t offset = m.memory.offset(reinterpret_cast<uintptr_t>(address));
  if (pe < 0 || static_cast<size_t>(pe) >= memories.size() || mine >= memories.size()) {
    m.fail("put misuse: " + m.who(thread) + " puts to PE " + std::to_string(pe) +
           ", and there is symmetric memory of " + std::to_string(memories.size()) + " PEs");
  }
  const GlobalMemory& own = *memories[mine];
  if (at < own.data() || at + bytes > own.data() + own.size()) {
    m.fail("put misuse: " + m.who(thread) + " puts, and " + m.where(offset) +
           " is not in the symmetric memory of its own PE");
  }
  const GlobalMemory& of_pe = *memories[static_cast<size_t>(pe)];
  return m.memory.offset(reinterpret_cast<uintptr_t>(of_pe.data() + (at - own.data())));
}

}  // namespace

Id Machine::new_flight(Id thread) {
  size_t i = 0;
  while (i < flights.size() && flights[i] != kNoThread) ++i;
  if (i == flights.size()) {
    if (threads.size() + agents.size() + flights.size() >= kMaxId) fail("too many puts at a time");
    flights.push_back(kNoThread);
  }
  flights[i] = thread;
  return static_cast<Id>(kMaxId - 1 - i);
}

void Machine::deliver(Put& put) {
  AtomicLocation& location = locations[put.signal];
  if (location.puts++ == 0) {
    location.network = new_agent({Agent::Kind::kPut, 0, put.signal});
  }
  const uint32_t epoch = shadow.base() + 1 + location.puts;
  shadow.relabel(put.source, put.bytes, false, put.flight, put.number, location.network, epoch);
  shadow.relabel(put.target, put.bytes, true, put.flight, put.number, location.network, epoch);
  flights[kMaxId - 1 - put.flight] = kNoThread;

  Thread& thread = threads[put.thread];
  const View view{clocks.with(put.released.seen, location.network, epoch),
                  put.released.visible_to_async};
  shadow.write(put.signal, kSignalBytes,
               {.id = location.network,
                .epoch = epoch,
                .thread = put.thread,
                .seen = view.seen.get(),
                .visible_to_async = view.visible_to_async.get(),
                .async = false,
                .atomic = true});
  uint64_t value = put.value;
  if (put.add) {
    if (location.added_by_threads) {
      fail("signal misuse: a put adds to " + where(put.signal) +
           ", to which threads add atomically; neither is atomic to the other");
    }
    location.added_by_network = true;
    uint64_t before = 0;
    std::memcpy(&before, memory.at(put.signal), kSignalBytes);
    value += before;
  } else {
    location.gpus.clear();
    location.put = {};
  }
  std::memcpy(memory.at(put.signal), &value, kSignalBytes);
  add(location.put, view);

  add(thread.put, view);
  if (--thread.puts == 0 && thread.wait == Wait::kQuiet) make_ready(thread);
}

void put_signal(void* target, const void* source, size_t bytes, uint64_t* signal, uint64_t value,
                bool add, int pe, bool alike) {
  Thread& thread = begin_hook("put_signal", __builtin_return_address(0));
  Machine& m = *machine;
  if (!alike) {
    m.fail("put misuse: " + m.who(thread) + " puts, and other lanes of its warp something else");
  }
  thread.unproductive = 0;
  Put put{};
  put.source = symmetric(thread, source, bytes, m.block_of(thread).gpu);
  put.target = symmetric(thread, target, bytes, pe);
  put.signal = symmetric(thread, signal, kSignalBytes, pe);
  put.bytes = bytes;
  put.value = value;
  put.add = add;
  put.thread = thread.id;
  put.flight = m.new_flight(thread.id);
  put.number = m.shadow.base() + 1 + ++m.puts;
  put.released = thread.released[kSystem];
  if (put.signal % kSignalBytes != 0) {
    m.fail("misaligned: " + m.who(thread) + " puts with the signal " + m.where(put.signal));
  }
  Accessor accessor = m.accessor(thread);
  accessor.id = put.flight;
  accessor.epoch = put.number;
  // The network sees what the thread itself wrote, and of others what its last fence released.
  Accessor reader = accessor;
  reader.seen = put.released.seen.get();
  m.shadow.read(put.source, bytes, reader, false);
  m.shadow.write(put.target, bytes, accessor);
  // Who reads the target too early sees NaN.
  std::memset(m.memory.at(put.target), 0xff, bytes);
  ++thread.puts;

  // The bytes land in pieces, in any order.
  const size_t pieces = std::min<size_t>(bytes, 1 + m.random.below(4));
  uint64_t last = m.now;
  for (size_t piece = 0; piece < pieces; ++piece) {
    const size_t begin = bytes * piece / pieces, end = bytes * (piece + 1) / pieces;
    const uint64_t time = m.now + m.delay();
    last = std::max(last, time);
    m.at(time, [&m, to = put.target + begin, from = put.source + begin, size = end - begin] {
      std::memcpy(m.memory.at(to), m.memory.at(from), size);
    });
  }
  m.at(last + m.delay(), [&m, put]() mutable { m.deliver(put); });
}

void acquire_puts(const uint64_t* signal) {
  Thread& thread = begin_hook("acquire_puts", __builtin_return_address(0));
  Machine& m = *machine;
  const auto location = m.locations.find(m.memory.offset(reinterpret_cast<uintptr_t>(signal)));
  if (location != m.locations.end()) m.acquire(thread, location->second.put);
}

void quiet() {
  Thread& thread = begin_hook("quiet", __builtin_return_address(0));
  Machine& m = *machine;
  if (thread.puts > 0) m.block(Wait::kQuiet);
  m.acquire(thread, thread.put);
}

}  // namespace flashmoe::emulator
