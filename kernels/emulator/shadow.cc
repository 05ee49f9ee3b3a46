#include "kernels/emulator/shadow.h"

#include <algorithm>
#include <bit>

namespace flashmoe::emulator {
namespace {

// Calls f(cell, offset of the first byte in it, mask of the bytes) for each cell of a range.
template <typename F>
inline void for_cells(size_t offset, size_t bytes, F f) {
  Cell* cell = &Memory::instance().cell(offset);
  const size_t end = offset + bytes;
  for (size_t at = offset; at < end; ++cell) {
    const size_t next = std::min(end, (at / 4 + 1) * 4);
    f(*cell, at, static_cast<uint8_t>(((1u << (next - at)) - 1) << at % 4));
    at = next;
  }
}

constexpr uint8_t kWhole = 0xf;
constexpr uint8_t kWriteFlags = kAsyncWrite | kAtomicWrite;

}  // namespace

void Shadow::report(Conflict::Kind kind, bool write, bool other_write, size_t offset,
                    const Accessor& a, const Cell& cell, Id other, uint32_t other_epoch) const {
  report_({.kind = kind,
           .write = write,
           .other_write = other_write,
           .offset = offset,
           .accessor = a,
           .other = other,
           .other_epoch = other_epoch,
           .other_async = other_write && (cell.flags & kAsyncWrite)});
  __builtin_unreachable();
}

// The write before must be known to the accessor; and, if one of the two went through the async
// proxy and the write did not, be visible there.
void Shadow::check_after_write(const Cell& cell, size_t offset, bool write,
                               const Accessor& a) const {
  if (!live(cell.write_epoch)) return;
  if (cell.flags & kAtomicWrite && a.atomic) return;
  const bool async = (cell.flags & kAsyncWrite) != 0;
  if (is_visible({cell.writer, cell.write_epoch, async}, a)) return;
  const bool race = !before(cell.writer, cell.write_epoch, a);
  report(race ? Conflict::Kind::kRace : Conflict::Kind::kProxy, write, true, offset, a, cell,
         cell.writer, cell.write_epoch);
}

void Shadow::check_after_reads(const Cell& cell, size_t offset, const Accessor& a) const {
  if (!live(cell.read_epoch)) return;
  if (cell.reader != kManyReaders) {
    if (before(cell.reader, cell.read_epoch, a)) return;
    report(Conflict::Kind::kRace, true, false, offset, a, cell, cell.reader, cell.read_epoch);
  }
  for (const Reader& reader : readers_[cell.read_epoch - base_ - 1]) {
    if (before(reader.id, reader.epoch, a)) continue;
    report(Conflict::Kind::kRace, true, false, offset, a, cell, reader.id, reader.epoch);
  }
}

void Shadow::record_read(Cell& cell, const Accessor& a) {
  // A read that is before this one need not be remembered: who is after this one is after both.
  if (cell.reader != kManyReaders || !live(cell.read_epoch)) {
    if (cell.reader == a.id || before(cell.reader, cell.read_epoch, a)) {
      cell.reader = a.id;
      cell.read_epoch = a.epoch;
      return;
    }
    readers_.emplace_back().reserve(8);  // most sets then need no more
    readers_.back().push_back({cell.reader, cell.read_epoch});
    cell.reader = kManyReaders;
    cell.read_epoch = base_ + static_cast<uint32_t>(readers_.size());
  }
  add_reader(cell, a);
}

void Shadow::add_reader(Cell& cell, const Accessor& a) {
  Readers& readers = readers_[cell.read_epoch - base_ - 1];
  const auto same = std::find_if(readers.rbegin(), readers.rend(),
                                 [&](const Reader& reader) { return reader.id == a.id; });
  if (same != readers.rend()) {
    same->epoch = a.epoch;
    return;
  }
  if (std::has_single_bit(readers.size())) {  // now and then
    std::erase_if(readers, [&](const Reader& r) { return before(r.id, r.epoch, a); });
  }
  readers.push_back({a.id, a.epoch});
}

void Shadow::read_cell(Cell& cell, size_t offset, const Accessor& a) {
  if (cell.reader == a.id && cell.read_epoch == a.epoch && !a.async && !a.atomic) return;
  check_after_write(cell, offset, false, a);
  // Writes that conflict with an atomic read are found when the read comes second.
  if (!a.atomic) record_read(cell, a);
}

void Shadow::write_cell(Cell& cell, size_t offset, const Accessor& a) const {
  check_after_write(cell, offset, true, a);
  check_after_reads(cell, offset, a);
  cell.writer = a.id;
  cell.write_epoch = a.epoch;
  cell.read_epoch = 0;
  cell.flags = static_cast<uint8_t>((a.async ? kAsyncWrite : 0) | (a.atomic ? kAtomicWrite : 0));
}

std::array<Cell, 4>& Shadow::split(Cell& cell) {
  if (!is_split(cell)) {
    Cell byte = cell;
    byte.flags &= kWriteFlags;
    // Each byte has its own set of readers.
    std::array<Cell, 4> bytes{byte, byte, byte, byte};
    if (live(cell.read_epoch) && cell.reader == kManyReaders) {
      for (size_t i = 1; i < 4; ++i) {
        readers_.push_back(readers_[cell.read_epoch - base_ - 1]);
        bytes[i].read_epoch = base_ + static_cast<uint32_t>(readers_.size());
      }
    }
    splits_.push_back(bytes);
    cell.write_epoch = base_ + static_cast<uint32_t>(splits_.size());
    cell.read_epoch = 0;
    cell.flags = static_cast<uint8_t>((cell.flags & kBarrierCell) | kSplit);
  }
  return splits_[cell.write_epoch - base_ - 1];
}

void Shadow::read_part(Cell& cell, size_t offset, uint8_t mask, const Accessor& a) {
  for (size_t i = 0; i < 4; ++i) {
    if (mask >> i & 1) read_cell(split(cell)[i], offset / 4 * 4 + i, a);
  }
}

void Shadow::write_part(Cell& cell, size_t offset, uint8_t mask, const Accessor& a) {
  std::array<Cell, 4>& bytes = split(cell);
  for (size_t i = 0; i < 4; ++i) {
    if (mask >> i & 1) write_cell(bytes[i], offset / 4 * 4 + i, a);
  }
}

void Shadow::read(size_t offset, size_t bytes, const Accessor& a, bool constant) {
  for_cells(offset, bytes, [&](Cell& cell, size_t at, uint8_t mask) {
    if (cell.flags & kBarrierCell) [[unlikely]] {
      report(Conflict::Kind::kBarrierObject, false, true, at, a, cell, 0, 0);
    }
    if ((cell.written & mask) != mask) [[unlikely]] {
      const int byte = std::countr_zero(static_cast<unsigned>(mask & ~cell.written));
      report(Conflict::Kind::kUnwritten, false, true, at / 4 * 4 + static_cast<size_t>(byte), a,
             cell, 0, 0);
    }
    if (constant) return;
    if (mask == kWhole && !is_split(cell)) {
      cell.flags &= static_cast<uint8_t>(~kSplit);
      read_cell(cell, at, a);
    } else {
      read_part(cell, at, mask, a);
    }
  });
}

void Shadow::write(size_t offset, size_t bytes, const Accessor& a) {
  for_cells(offset, bytes, [&](Cell& cell, size_t at, uint8_t mask) {
    if (cell.flags & kBarrierCell) [[unlikely]] {
      report(Conflict::Kind::kBarrierObject, true, true, at, a, cell, 0, 0);
    }
    if (mask != kWhole) {
      write_part(cell, at, mask, a);
    } else {
      if (is_split(cell)) write_part(cell, at, mask, a);  // for its checks
      if (is_split(cell)) {
        cell.write_epoch = cell.read_epoch = 0;
        cell.flags = 0;
      }
      write_cell(cell, at, a);
    }
    cell.written |= mask;
  });
}

void Shadow::relabel(size_t offset, size_t bytes, bool write, Id from, uint32_t from_epoch, Id to,
                     uint32_t to_epoch) {
  const auto relabel_cell = [&](Cell& cell) {
    if (write) {
      if (cell.writer != from || cell.write_epoch != from_epoch) return;
      cell.writer = to;
      cell.write_epoch = to_epoch;
    } else if (!live(cell.read_epoch)) {
    } else if (cell.reader == kManyReaders) {
      for (Reader& reader : readers_[cell.read_epoch - base_ - 1]) {
        if (reader.id == from && reader.epoch == from_epoch) reader = {to, to_epoch};
      }
    } else if (cell.reader == from && cell.read_epoch == from_epoch) {
      cell.reader = to;
      cell.read_epoch = to_epoch;
    }
  };
  for_cells(offset, bytes, [&](Cell& cell, size_t, uint8_t mask) {
    if (!is_split(cell)) {
      relabel_cell(cell);
      return;
    }
    for (size_t i = 0; i < 4; ++i) {
      if (mask >> i & 1) relabel_cell(split(cell)[i]);
    }
  });
}

void Shadow::collect(size_t offset, size_t bytes, std::vector<Written>& writes) {
  const auto add = [&](const Cell& cell) {
    if (!live(cell.write_epoch)) return;
    for (size_t i = writes.size(); i-- > 0;) {
      const Written& other = writes[i];
      if (other.writer == cell.writer && other.epoch == cell.write_epoch) return;
    }
    writes.push_back({cell.writer, cell.write_epoch, (cell.flags & kAsyncWrite) != 0});
  };
  for_cells(offset, bytes, [&](Cell& cell, size_t, uint8_t mask) {
    if (!is_split(cell)) {
      add(cell);
      return;
    }
    for (size_t i = 0; i < 4; ++i) {
      if (mask >> i & 1) add(split(cell)[i]);
    }
  });
}

void Shadow::clear_barrier(size_t offset, size_t bytes) {
  for_cells(offset, bytes,
            [](Cell& cell, size_t, uint8_t) { cell.flags &= static_cast<uint8_t>(~kBarrierCell); });
}

void Shadow::set_barrier(size_t offset, size_t bytes) {
  for_cells(offset, bytes, [](Cell& cell, size_t, uint8_t) { cell.flags |= kBarrierCell; });
}

}  // namespace flashmoe::emulator
