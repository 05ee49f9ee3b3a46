// What is remembered of every 4 bytes of memory, and the checks of an access against it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <vector>

#include "kernels/emulator/memory.h"
#include "kernels/emulator/vector_clock.h"

namespace flashmoe::emulator {

// The last write of 4 bytes and the reads since. Epochs up to the launch's base are of earlier
// launches and of the host, and before everything. Zero is memory that was never written.
//
// Once an access covers only a part of the bytes, each byte has a cell of its own (kSplit):
// write_epoch - base - 1 is then their index, and only `written` and kBarrierCell are of the four.
struct Cell {
  uint32_t write_epoch;
  uint32_t read_epoch;
  Id writer;
  Id reader;  // or kManyReaders, and read_epoch - base - 1 is the index of a set
  uint8_t flags;
  uint8_t written;  // bit i: byte i
};
static_assert(sizeof(Cell) == 16);

inline constexpr uint8_t kAsyncWrite = 1, kAtomicWrite = 2, kSplit = 4, kBarrierCell = 8;

inline constexpr Id kManyReaders = 0xffff;
// async_copy_16 that nobody waited for yet; the epoch says whose.
inline constexpr Id kCopyInFlight = 0xfffe;
inline constexpr Id kMaxId = 0xfff0;

struct Accessor {
  Id id;           // who accesses, and
  uint32_t epoch;  // when: the stamps
  Id thread;       // the thread whose earlier accesses are before this one
  const Clock* seen;
  const Clock* visible_to_async;
  bool async;  // through the async proxy
  bool atomic;
};

// A pair of accesses that nothing orders, or an access that must not be.
struct Conflict {
  enum class Kind { kRace, kProxy, kUnwritten, kBarrierObject };
  Kind kind;
  bool write;        // what the accessor does
  bool other_write;  // what the other did
  size_t offset;
  Accessor accessor;
  Id other;
  uint32_t other_epoch;
  bool other_async;
};

class Shadow {
 public:
  // Reports a conflict; does not return.
  using Report = void (*)(const Conflict&);

  Shadow(Clocks& clocks, uint32_t base, Report report)
      : clocks_(clocks), base_(base), report_(report) {}

  // One access of `bytes` at `offset` of Memory, which must be in bounds. `constant`: nobody ever
  // writes there.
  void read(size_t offset, size_t bytes, const Accessor& accessor, bool constant);
  void write(size_t offset, size_t bytes, const Accessor& accessor);
  // Replaces what `from` wrote or read there by `to`, where it is the last to have done so.
  void relabel(size_t offset, size_t bytes, bool write, Id from, uint32_t from_epoch, Id to,
               uint32_t to_epoch);
  // Adds the writes that are last in some of these bytes.
  struct Written {
    Id writer;
    uint32_t epoch;
    bool async;
  };
  void collect(size_t offset, size_t bytes, std::vector<Written>& writes);
  // Whether a read after that write is as it must be.
  bool is_visible(const Written& write, const Accessor& a) const {
    if (!a.async || write.async) return before(write.writer, write.epoch, a);
    return !live(write.epoch) || clocks_.knows(a.visible_to_async, write.writer, write.epoch);
  }
  // The bytes are an mbarrier from now on.
  void set_barrier(size_t offset, size_t bytes);
  void clear_barrier(size_t offset, size_t bytes);

  uint32_t base() const { return base_; }
  // At least every epoch-like number that is in use.
  uint32_t highest() const {
    return base_ + 1 + static_cast<uint32_t>(std::max(splits_.size(), readers_.size()));
  }

 private:
  struct Reader {
    Id id;
    uint32_t epoch;
  };
  using Readers = std::pmr::vector<Reader>;

  bool live(uint32_t epoch) const { return epoch > base_; }
  bool before(Id id, uint32_t epoch, const Accessor& a) const {
    return !live(epoch) || id == a.thread || clocks_.knows(a.seen, id, epoch);
  }
  void check_after_write(const Cell& cell, size_t offset, bool write, const Accessor& a) const;
  void check_after_reads(const Cell& cell, size_t offset, const Accessor& a) const;
  void record_read(Cell& cell, const Accessor& a);
  void add_reader(Cell& cell, const Accessor& a);
  void read_cell(Cell& cell, size_t offset, const Accessor& a);
  void write_cell(Cell& cell, size_t offset, const Accessor& a) const;
  bool is_split(const Cell& cell) const { return (cell.flags & kSplit) && live(cell.write_epoch); }
  std::array<Cell, 4>& split(Cell& cell);
  void read_part(Cell& cell, size_t offset, uint8_t mask, const Accessor& a);
  void write_part(Cell& cell, size_t offset, uint8_t mask, const Accessor& a);
  [[gnu::cold]] [[noreturn]] void report(Conflict::Kind kind, bool write, bool other_write,
                                         size_t offset, const Accessor& a, const Cell& cell,
                                         Id other, uint32_t other_epoch) const;

  Clocks& clocks_;
  uint32_t base_;
  Report report_;
  std::vector<std::array<Cell, 4>> splits_;
  std::pmr::monotonic_buffer_resource memory_of_readers_;  // freed with the launch
  std::pmr::vector<Readers> readers_{&memory_of_readers_};
};

}  // namespace flashmoe::emulator
