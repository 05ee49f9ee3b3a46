// Copies into shared memory that nobody waits for: async_copy_16 and tma_load. What they read and
// write is checked when they are issued, with identities that become known with the phase of the
// mbarrier on which they complete; the bytes move later.
#include <algorithm>
#include <cstring>

#include "kernels/emulator/machine.h"

namespace flashmoe::emulator {
namespace {

constexpr uint32_t kCopyBytes = 16;
constexpr uint32_t kLineBytes = 128;  // of a box
constexpr uint32_t kSwizzleBytes = 1024;

// Who reads the destination too early sees NaN.
void poison(std::byte* destination, size_t bytes) { std::memset(destination, 0xff, bytes); }

}  // namespace

void async_copy_16(void* shared, const void* global, uint32_t bytes) {
  Thread& thread = begin_hook("async_copy_16", __builtin_return_address(0));
  Machine& m = *machine;
  PendingCopy copy{m.memory.offset(reinterpret_cast<uintptr_t>(shared)),
                   m.memory.offset(reinterpret_cast<uintptr_t>(global)), bytes, false};
  if (bytes > kCopyBytes) {
    m.fail(m.who(thread) + " copies " + std::to_string(bytes) + " bytes by async_copy_16");
  }
  m.check_bounds(copy.shared, kCopyBytes, true, true, false);
  if (copy.shared % kCopyBytes != 0 || (bytes > 0 && copy.global % kCopyBytes != 0)) {
    m.fail("misaligned: " + m.who(thread) + " copies 16 bytes from " + m.where(copy.global) +
           " to " + m.where(copy.shared));
  }
  Accessor accessor = m.accessor(thread);
  accessor.id = kCopyInFlight;
  accessor.epoch = m.shadow.base() + 1 + thread.id;
  if (bytes > 0) {
    const bool constant = m.check_bounds(copy.global, bytes, false, false, true);
    m.shadow.read(copy.global, bytes, accessor, constant);
  }
  m.shadow.write(copy.shared, kCopyBytes, accessor);
  poison(m.memory.at(copy.shared), kCopyBytes);
  thread.copies.push_back(copy);
  if (m.random.one_in(4)) m.land(thread.copies.back());
}

void Machine::land(PendingCopy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  std::byte* to = memory.at(copy.shared);
  std::memset(to, 0, kCopyBytes);
  if (copy.bytes > 0) std::memcpy(to, memory.at(copy.global), copy.bytes);
}

void async_copy_arrive(void* address) {
  Thread& thread = begin_hook("async_copy_arrive", __builtin_return_address(0));
  Machine& m = *machine;
  Mbarrier& barrier = m.find_mbarrier(address);
  thread.unproductive = 0;
  // Copies of earlier arrivals are done by then, too.
  ++barrier.arriving;
  thread.last_arrival = std::max(thread.last_arrival, m.now + m.delay());
  m.at(thread.last_arrival, [&m, &thread, &barrier, copies = std::move(thread.copies)]() mutable {
    const uint32_t epoch = m.shadow.base() + 1 + thread.id;
    const uint32_t phase = m.shadow.base() + 1 + barrier.phase;
    for (PendingCopy& copy : copies) {
      m.land(copy);
      m.shadow.relabel(copy.shared, kCopyBytes, true, kCopyInFlight, epoch, barrier.agent, phase);
      if (copy.bytes == 0) continue;
      m.shadow.relabel(copy.global, copy.bytes, false, kCopyInFlight, epoch, barrier.agent, phase);
    }
    --barrier.arriving;
    m.arrive(barrier);
  });
  thread.copies.clear();
}

void tma_load(void* shared, const TensorMap* map, void* mbarrier, int32_t x, int32_t y, int32_t z) {
  Thread& thread = begin_hook("tma_load", __builtin_return_address(0));
  Machine& m = *machine;
  Mbarrier& barrier = m.find_mbarrier(mbarrier);
  const size_t to = m.memory.offset(reinterpret_cast<uintptr_t>(shared));
  const auto misuse = [&](const std::string& what) {
    m.fail("TMA misuse: " + m.who(thread) + " loads to " + m.where(to) + ": " + what);
  };
  if (!barrier.fenced) {
    misuse(m.where(barrier.offset) + " was initialised without fence_mbarrier_init");
  }
  const uint32_t lines = map->box[1] * map->box[2];
  m.check_bounds(to, size_t{lines} * kLineBytes, true, true, false);
  if (to % kSwizzleBytes != 0) misuse("not a multiple of 1024");
  if (map->box[0] * map->element_bytes != kLineBytes) misuse("the box is not 128 bytes wide");
  if (map->box[1] == 0 || map->box[2] == 0 || map->box[1] > 256 || map->box[2] > 256) {
    misuse("a side of the box is not 1 to 256");
  }
  const uintptr_t base = reinterpret_cast<uintptr_t>(map->base);
  if (base % 16 != 0) misuse("the tensor's address is not a multiple of 16");
  if (map->stride[0] % 16 != 0 || map->stride[1] % 16 != 0) {
    misuse("a stride is not a multiple of 16 bytes");
  }
  Accessor accessor = m.accessor(thread);
  accessor.id = barrier.agent;
  accessor.epoch = m.shadow.base() + 1 + barrier.phase;
  accessor.async = true;
  // Where each line comes from; bytes outside the tensor are zeros.
  struct Line {
    size_t from;
    uint32_t skip, bytes;
  };
  std::vector<Line> all;
  all.reserve(lines);
  const int64_t element = map->element_bytes;
  const int64_t first = std::clamp<int64_t>(-int64_t{x}, 0, map->box[0]);
  const int64_t last =
      std::clamp<int64_t>(static_cast<int64_t>(map->size[0]) - x, first, map->box[0]);
  for (uint32_t line = 0; line < lines; ++line) {
    const int64_t row = int64_t{y} + line % map->box[1], slice = int64_t{z} + line / map->box[1];
    const bool inside = row >= 0 && row < static_cast<int64_t>(map->size[1]) && slice >= 0 &&
                        slice < static_cast<int64_t>(map->size[2]) && last > first;
    if (!inside) {
      all.push_back({0, 0, 0});
      continue;
    }
    const size_t from = m.memory.offset(base) + static_cast<size_t>(slice) * map->stride[1] +
                        static_cast<size_t>(row) * map->stride[0] +
                        static_cast<size_t>((x + first) * element);
    all.push_back({from, static_cast<uint32_t>(first * element),
                   static_cast<uint32_t>((last - first) * element)});
    const bool constant = m.check_bounds(from, all.back().bytes, false, false, true);
    m.shadow.read(from, all.back().bytes, accessor, constant);
  }
  m.shadow.write(to, size_t{lines} * kLineBytes, accessor);
  poison(m.memory.at(to), size_t{lines} * kLineBytes);

  // The lines land in pieces, in any order.
  const uint32_t pieces = std::min<uint32_t>(lines, 1 + static_cast<uint32_t>(m.random.below(4)));
  for (uint32_t piece = 0; piece < pieces; ++piece) {
    const uint32_t begin = lines * piece / pieces, end = lines * (piece + 1) / pieces;
    m.at(m.now + m.delay(), [&m, &barrier, to, begin, phase = barrier.phase,
                             part = std::vector<Line>(all.begin() + begin, all.begin() + end)] {
      if (barrier.phase != phase) {
        m.fail("TMA misuse: bytes land after the phase of " + m.where(barrier.offset) +
               " in which they were requested; it did not expect them");
      }
      for (size_t i = 0; i < part.size(); ++i) {
        std::byte line[kLineBytes] = {};
        if (part[i].bytes > 0) {
          std::memcpy(line + part[i].skip, m.memory.at(part[i].from), part[i].bytes);
        }
        const size_t index = begin + i;
        std::byte* destination = m.memory.at(to + index * kLineBytes);
        for (size_t chunk = 0; chunk < 8; ++chunk) {
          std::memcpy(destination + (chunk ^ index % 8) * 16, line + chunk * 16, 16);
        }
      }
      m.complete_bytes(barrier, static_cast<int64_t>(part.size() * kLineBytes));
    });
  }
}

}  // namespace flashmoe::emulator
