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

// Which of two lists of entries is nowhere below the other.
struct Compared {
  bool a_covers_b, b_covers_a;
};

Compared compare(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b) {
  constexpr size_t kAtOnce = 16;  // a number that compilers turn into vector instructions
  const size_t common = std::min(a.size(), b.size());
  uint32_t a_below = 0, b_below = 0;
  size_t i = 0;
  for (; i + kAtOnce <= common && !(a_below && b_below); i += kAtOnce) {
    for (size_t j = i; j < i + kAtOnce; ++j) {
      const uint32_t higher = std::max(a[j], b[j]);
      a_below |= higher ^ a[j];
      b_below |= higher ^ b[j];
    }
  }
  if (a_below && b_below) return {false, false};
  for (; i < common; ++i) {
    a_below |= a[i] < b[i];
    b_below |= b[i] < a[i];
  }
  for (size_t j = common; j < b.size(); ++j) a_below |= b[j] != 0;
  for (size_t j = common; j < a.size(); ++j) b_below |= a[j] != 0;
  return {!a_below, !b_below};
}

// Whether `a` knows the lanes that `b` lists.
bool knows_lanes(const Clock& a, const Clock& b) {
  auto known = a.lanes.begin();
  for (const LaneEpoch& lane : b.lanes) {
    const size_t warp = lane.thread / 32u;
    if (warp < a.entries.size() && lane.epoch <= a.entries[warp]) continue;
    while (known != a.lanes.end() && known->thread < lane.thread) ++known;
    if (known == a.lanes.end() || known->thread != lane.thread || known->epoch < lane.epoch) {
      return false;
    }
  }
  return true;
}

}  // namespace

void ClockRef::release(Clock* clock) { pool().emplace_back(clock); }

ClockRef Clocks::join(const ClockRef& a, const ClockRef& b) {
  const auto key = (reinterpret_cast<uintptr_t>(a.get()) >> 4) * 31 +
                   (reinterpret_cast<uintptr_t>(b.get()) >> 4);
  Memo& memo = memos_[(key ^ key >> 7) % kMemos];
  if (memo.a == a && memo.b == b) return memo.joined;
  ClockRef joined;
  const Compared entries = compare(a->entries, b->entries);
  if (entries.a_covers_b && knows_lanes(*a.get(), *b.get())) {
    joined = a;
  } else if (entries.b_covers_a && knows_lanes(*b.get(), *a.get())) {
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
