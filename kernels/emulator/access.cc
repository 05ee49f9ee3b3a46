// Accesses of threads to memory.
#include "kernels/emulator/machine.h"

namespace flashmoe::emulator {

namespace {

// No kernel has that many in a row.
constexpr uint64_t kMostPlainAccesses = 200'000'000;

}  // namespace

Accessor Machine::accessor(const Thread& thread, bool atomic) const {
  return {.id = thread.id,
          .epoch = thread.epoch,
          .thread = thread.id,
          .seen = thread.view.seen.get(),
          .visible_to_async = thread.view.visible_to_async.get(),
          .async = false,
          .atomic = atomic};
}

bool Machine::check_bounds(size_t offset, size_t bytes, bool write, bool shared_only,
                           bool global_only) {
  if (bytes == 0) return true;
  const std::string_view does = write ? " writes " : " reads ";
  const auto say = [&](std::string_view what) {
    fail("out of bounds: " + who(*current) + std::string(does) + std::to_string(bytes) +
         " bytes at " + where(offset) + std::string(what));
  };
  if (offset < Memory::kSharedEnd) {
    if (global_only) say(", where global memory is needed");
    if (offset / Memory::kSharedStride != static_cast<size_t>(current->block)) {
      say(", which is not its own CTA's");
    }
    if (offset % Memory::kSharedStride + bytes > launch.shared_bytes) {
      say(", of which the CTA has " + std::to_string(launch.shared_bytes) + " bytes");
    }
    return false;
  }
  if (shared_only) say(", where shared memory is needed");
  if (offset >= Memory::kEnd) say("");
  const Memory::Piece* piece = memory.find(offset, bytes);
  if (!piece) say("");
  if (write && piece->constant) say(", which is constant");
  return piece->constant;
}

void Machine::plain(uintptr_t address, size_t bytes, bool write, const void* place) {
  const size_t offset = memory.offset(address);
  if (offset >= Memory::kEnd) return;  // a stack, a constant or an object of the host
  current->place = place;
  if (++plain_accesses_ > kMostPlainAccesses) {
    fail("endless loop: " + who(*current) + " does nothing but load and store since " +
         current->doing);
  }
  const bool constant = check_bounds(offset, bytes, write, false, false);
  if (write) {
    shadow.write(offset, bytes, accessor(*current));
  } else {
    shadow.read(offset, bytes, accessor(*current), constant);
  }
}

}  // namespace flashmoe::emulator
