#include "kernels/emulator/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "kernels/emulator/shadow.h"

namespace flashmoe::emulator {
namespace {

// Between pieces, so that an access that misses its piece misses them all; more than a page.
constexpr size_t kGap = 256 * 1024;
constexpr size_t kAlignment = 256;  // what cudaMalloc gives

void* reserve(size_t bytes) {
  void* begin = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (begin == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  return begin;
}

}  // namespace

Memory& Memory::instance() {
  static Memory memory;
  return memory;
}

Memory::Memory()
    : begin_(reinterpret_cast<uintptr_t>(reserve(kEnd))),
      cells_(static_cast<Cell*>(reserve(kEnd / 4 * sizeof(Cell)))) {}

Cell& Memory::cell(size_t offset) const { return cells_[offset / 4]; }

std::byte* Memory::allocate(size_t bytes, std::string name, bool constant) {
  // The first gap that is wide enough.
  size_t begin = kSharedEnd + kGap;
  auto next = pieces_.begin();
  for (; next != pieces_.end(); ++next) {
    if (begin + bytes + kGap <= next->begin) break;
    begin = (next->begin + next->bytes + kGap + kAlignment - 1) / kAlignment * kAlignment;
  }
  if (begin + bytes + kGap > kEnd) throw std::bad_alloc();
  pieces_.insert(next, {begin, bytes, std::move(name), constant});
  std::memset(at(begin), 0xff, bytes);
  return at(begin);
}

void Memory::free(std::byte* data) {
  const size_t begin = offset(reinterpret_cast<uintptr_t>(data));
  const auto piece = std::find_if(pieces_.begin(), pieces_.end(),
                                  [&](const Piece& p) { return p.begin == begin; });
  std::memset(static_cast<void*>(&cell(begin)), 0, (piece->bytes + 3) / 4 * sizeof(Cell));
  pieces_.erase(piece);
}

void Memory::mark_written(const std::byte* data, size_t bytes) {
  const size_t begin = offset(reinterpret_cast<uintptr_t>(data));
  for (size_t i = begin; i < begin + bytes;) {
    const size_t end = std::min(begin + bytes, (i / 4 + 1) * 4);
    for (Cell& c = cell(i); i < end; ++i) c.written |= static_cast<uint8_t>(1u << i % 4);
  }
}

const Memory::Piece* Memory::search(size_t offset, size_t bytes) {
  const Piece* piece = before(offset);
  if (!piece || offset + bytes > piece->begin + piece->bytes) return nullptr;
  last_ = static_cast<size_t>(piece - pieces_.data());
  return piece;
}

const Memory::Piece* Memory::before(size_t offset) const {
  const auto next = std::upper_bound(pieces_.begin(), pieces_.end(), offset,
                                     [](size_t o, const Piece& p) { return o < p.begin; });
  return next == pieces_.begin() ? nullptr : &next[-1];
}

void Memory::forget_accesses() {
  for (const Piece& piece : pieces_) {
    for (size_t i = 0; i < piece.bytes; i += 4) {
      Cell& c = cell(piece.begin + i);
      c = {0, 0, 0, 0, 0, c.written};
    }
  }
}

void Memory::reset_shared(int block, size_t bytes) {
  std::byte* begin = shared(block);
  std::memset(begin, 0xff, bytes);
  std::memset(static_cast<void*>(&cell(offset(reinterpret_cast<uintptr_t>(begin)))), 0,
              (bytes + 3) / 4 * sizeof(Cell));
}

}  // namespace flashmoe::emulator
