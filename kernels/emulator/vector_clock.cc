#include "kernels/emulator/vector_clock.h"

#include <memory>

namespace flashmoe::emulator {
namespace {

// Clocks that nobody refers to, with the memory of their vectors.
std::vector<std::unique_ptr<Clock>>& pool() {
  static std::vector<std::unique_ptr<Clock>> clocks;
  return clocks;
}

Clock* take() {
  if (pool().empty()) return new Clock;
  Clock* clock = pool().back().release();
  pool().pop_back();
  return clock;
}

Clock* copy(const ClockRef& from) {
  Clock* clock = take();
  if (from) {
    clock->entries = from->entries;
    clock->lanes = from->lanes;
  } else {
    clock->entries.clear();
    clock->lanes.clear();
  }
  return clock;
}

void raise(Clock& clock, size_t entry, uint32_t epoch) {
  if (clock.entries.size() <= entry) clock.entries.resize(entry + 1);
  clock.entries[entry] = std::max(clock.entries[entry], epoch);
}

}  // namespace

void ClockRef::release(Clock* clock) { pool().emplace_back(clock); }

bool Clocks::dominates(const Clock& a, const Clock& b) const {
  const size_t common = std::min(a.entries.size(), b.entries.size());
  unsigned less = 0;
  for (size_t i = 0; i < common; ++i) less |= a.entries[i] < b.entries[i];
  for (size_t i = common; i < b.entries.size(); ++i) less |= b.entries[i] != 0;
  if (less) return false;
  for (const LaneEpoch& lane : b.lanes) {
    if (!knows(&a, lane.thread, lane.epoch)) return false;
  }
  return true;
}

ClockRef Clocks::join(const ClockRef& a, const ClockRef& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  const auto key = (reinterpret_cast<uintptr_t>(a.get()) >> 4) * 31 +
                   (reinterpret_cast<uintptr_t>(b.get()) >> 4);
  Memo& memo = memos_[(key ^ key >> 7) % kMemos];
  if (memo.a == a && memo.b == b) return memo.joined;
  ClockRef joined;
  if (dominates(*a.get(), *b.get())) {
    joined = a;
  } else if (dominates(*b.get(), *a.get())) {
    joined = b;
  } else {
    Clock* clock = copy(a);
    joined = ClockRef(clock);
    if (clock->entries.size() < b->entries.size()) clock->entries.resize(b->entries.size());
    for (size_t i = 0; i < b->entries.size(); ++i) {
      clock->entries[i] = std::max(clock->entries[i], b->entries[i]);
    }
    clock->lanes.clear();
    const auto keep = [&](const LaneEpoch& lane) {
      const size_t warp = lane.thread / 32u;
      if (warp >= clock->entries.size() || lane.epoch > clock->entries[warp]) {
        clock->lanes.push_back(lane);
      }
    };
    auto i = a->lanes.begin(), j = b->lanes.begin();
    while (i != a->lanes.end() || j != b->lanes.end()) {
      if (j == b->lanes.end() || (i != a->lanes.end() && i->thread < j->thread)) {
        keep(*i++);
      } else if (i == a->lanes.end() || j->thread < i->thread) {
        keep(*j++);
      } else {
        keep({i->thread, std::max(i->epoch, j->epoch)});
        ++i, ++j;
      }
    }
  }
  memo = {a, b, joined};
  return joined;
}

ClockRef Clocks::with(const ClockRef& from, Id id, uint32_t epoch) {
  if (knows(from.get(), id, epoch)) return from;
  if (from && last_with_.from == from && last_with_.id == id && last_with_.epoch == epoch) {
    return last_with_.result;
  }
  Clock* clock = copy(from);
  ClockRef result(clock);
  if (id >= threads_) {
    raise(*clock, entry_of(id), epoch);
    last_with_ = {from, result, id, epoch};
    return result;
  }
  const auto lane = std::lower_bound(clock->lanes.begin(), clock->lanes.end(), id,
                                     [](const LaneEpoch& a, Id b) { return a.thread < b; });
  if (lane != clock->lanes.end() && lane->thread == id) {
    lane->epoch = epoch;
  } else {
    clock->lanes.insert(lane, {id, epoch});
  }
  return result;
}

ClockRef Clocks::with_warp(const ClockRef& from, size_t warp, uint32_t epoch) {
  Clock* clock = copy(from);
  ClockRef result(clock);
  raise(*clock, warp, epoch);
  std::erase_if(clock->lanes, [&](const LaneEpoch& lane) {
    return lane.thread / 32u == warp && lane.epoch <= clock->entries[warp];
  });
  return result;
}

}  // namespace flashmoe::emulator
