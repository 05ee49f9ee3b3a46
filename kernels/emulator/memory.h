// The memory that a kernel may touch: one range of addresses with the shared memory of every CTA
// and all global memory, with inaccessible (to the kernel) gaps between the pieces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace flashmoe::emulator {

struct Cell;

class Memory {
 public:
  static constexpr size_t kMaxBlocks = 1024;
  static constexpr size_t kSharedStride = 256 * 1024;  // more than any GPU gives a CTA
  static constexpr size_t kSharedEnd = kMaxBlocks * kSharedStride;
  static constexpr size_t kEnd = kSharedEnd + (size_t{4} << 30);

  struct Piece {
    size_t begin, bytes;
    std::string name;
    bool constant;
  };

  static Memory& instance();

  // Offset of an address; beyond kEnd if it is not in the range.
  size_t offset(uintptr_t address) const { return address - begin_; }
  std::byte* at(size_t offset) const { return reinterpret_cast<std::byte*>(begin_) + offset; }
  std::byte* shared(int block) const { return at(static_cast<size_t>(block) * kSharedStride); }
  // The cell of the 4 bytes at an offset.
  Cell& cell(size_t offset) const;

  std::byte* allocate(size_t bytes, std::string name, bool constant);
  void free(std::byte* data);
  void mark_written(const std::byte* data, size_t bytes);
  // The global piece that holds all of these bytes, or null.
  const Piece* find(size_t offset, size_t bytes) {
    if (last_ < pieces_.size()) {
      const Piece& last = pieces_[last_];
      if (offset >= last.begin && offset + bytes <= last.begin + last.bytes) return &last;
    }
    return search(offset, bytes);
  }
  // The piece that ends last before an offset, for messages; null if there is none.
  const Piece* before(size_t offset) const;

  // Forgets who wrote and read global memory, but not which bytes were ever written.
  void forget_accesses();
  // Makes the shared memory of a CTA unwritten.
  void reset_shared(int block, size_t bytes);

 private:
  Memory();
  const Piece* search(size_t offset, size_t bytes);

  uintptr_t begin_;
  Cell* cells_;
  std::vector<Piece> pieces_;  // by offset
  size_t last_ = 0;            // found last
};

}  // namespace flashmoe::emulator
