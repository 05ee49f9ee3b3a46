#include "kernels/cpu/trace.h"

#include <utility>

namespace flashmoe::cpu {

TraceBuffer::TraceBuffer(int64_t capacity) : room_(capacity) {}

void TraceBuffer::add(const core::TraceRecord& record) {
  const std::lock_guard lock(mutex_);
  if (room_ == 0) {
    ++contents_.lost;
    return;
  }
  --room_;
  contents_.records.push_back(record);
}

TraceBuffer::Contents TraceBuffer::close() {
  const std::lock_guard lock(mutex_);
  room_ = 0;
  return std::exchange(contents_, {});
}

}  // namespace flashmoe::cpu
