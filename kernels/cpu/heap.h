// The symmetric heaps of one expert group in one process.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels/core/heap_layout.h"
#include "kernels/core/shape.h"
#include "kernels/cpu/doorbell.h"

namespace flashmoe::cpu {

using Signal = std::atomic<uint64_t>;
static_assert(sizeof(Signal) == sizeof(uint64_t) && Signal::is_always_lock_free);

// Zeroed memory that the system hands out page by page as it is touched: a heap is sized for the
// worst case, most of which is never used.
class Memory {
 public:
  explicit Memory(int64_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  std::byte* data() const { return data_; }

 private:
  std::byte* data_;
  int64_t bytes_;
};

// Asks the system for large pages where whole ones lie in [data, data + bytes), which is about to
// be written. XLA gives a call's results new memory each time, and to get 200 MB of it in pages of
// 4 KiB takes longer than half of the products that fill them.
void prepare_to_write(void* data, int64_t bytes);

// Typed access to the sections of one PE's heap. Peers hold a reference to write into it.
class Heap {
 public:
  explicit Heap(const core::HeapLayout& layout) : layout_(layout), memory_(layout.bytes) {}

  int32_t* counts() const { return at<int32_t>(layout_.counts); }
  Signal* counted() const { return at<Signal>(layout_.counted); }
  template <typename S>
  S* recv() const {
    return at<S>(layout_.recv);
  }
  template <typename S>
  S* recv_x() const {
    return at<S>(layout_.recv_x);
  }
  core::Origin* origin() const { return at<core::Origin>(layout_.origin); }
  float* weight() const { return at<float>(layout_.weight); }
  Signal* arrived() const { return at<Signal>(layout_.arrived); }
  template <typename S>
  S* returned() const {
    return at<S>(layout_.returned);
  }
  float* returned_weight() const { return at<float>(layout_.returned_weight); }
  Signal* came_back() const { return at<Signal>(layout_.came_back); }

  Doorbell& doorbell() { return doorbell_; }

 private:
  template <typename T>
  T* at(const core::Section& section) const {
    return reinterpret_cast<T*>(memory_.data() + section.offset);
  }

  core::HeapLayout layout_;
  Memory memory_;
  Doorbell doorbell_;
};

// The heaps of all PEs of a group, the epoch they are in, and whether a PE has failed on them.
// A group that has failed is thrown away: its signals are in an unknown state.
class HeapGroup {
 public:
  HeapGroup(const core::Shape& shape, const core::Traffic& traffic);

  Heap& operator[](int32_t pe) { return *heaps_[pe]; }
  uint32_t epoch() const { return epoch_; }
  void next_epoch() { ++epoch_; }

  bool failed() const { return failed_.load(); }
  // Ends the waits of all PEs. The first message stays.
  void fail(const std::string& message);
  std::string failure() const;

  // What a heap was made for; only an equal call may use it again.
  bool fits(const core::Shape& shape, const core::Traffic& traffic) const {
    return shape == shape_ && traffic == traffic_;
  }

 private:
  core::Shape shape_;
  core::Traffic traffic_;
  std::vector<std::unique_ptr<Heap>> heaps_;
  uint32_t epoch_ = 0;
  std::atomic<bool> failed_{false};
  mutable std::mutex mutex_;
  std::string failure_;
};

}  // namespace flashmoe::cpu
