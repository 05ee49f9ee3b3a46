// Recording of tasks (core/trace.h). Where nobody asked for it, a task costs one test of a pointer.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/core/trace.h"
#include "kernels/cpu/doorbell.h"

namespace flashmoe::cpu {

// Records of all calls that start while it is the engine's, up to a number of them.
class TraceBuffer {
 public:
  explicit TraceBuffer(int64_t capacity);

  void add(const core::TraceRecord& record);

  struct Contents {
    std::vector<core::TraceRecord> records;
    int64_t lost;  // for which there was no room
  };
  // Takes out what is there. What calls that still run add later is forgotten.
  Contents close();

 private:
  std::mutex mutex_;
  int64_t room_;
  Contents contents_{};
};

// What the records of one PE in one call have in common.
struct CallTrace {
  std::shared_ptr<TraceBuffer> buffer;  // null: nothing is recorded
  int64_t call = 0;
  bool backward = false;
  int32_t group = 0;
  int32_t pe = 0;
  Clock::time_point entered{};   // when this PE did
  Clock::time_point complete{};  // when the last PE did

  core::TraceRecord record(core::Phase phase, int32_t worker) const {
    return {.call = call,
            .begin = 0,
            .ready = 0,
            .end = 0,
            .backward = backward,
            .group = group,
            .pe = pe,
            .worker = worker,
            .phase = phase,
            .expert = -1,
            .row_block = -1,
            .rows = 0};
  }
};

inline int64_t trace_time(Clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}

// The time from the entry of the PE until now, at the start of its first worker.
inline void record_entry(const CallTrace& trace) {
  if (trace.buffer == nullptr) return;
  core::TraceRecord record = trace.record(core::Phase::kEnter, 0);
  record.begin = trace_time(trace.entered);
  record.ready = trace_time(trace.complete);
  record.end = trace_time(Clock::now());
  trace.buffer->add(record);
}

// A task, from construction to destruction.
class Span {
 public:
  Span(const CallTrace& trace, int32_t worker, core::Phase phase)
      : buffer_(trace.buffer.get()), record_(trace.record(phase, worker)) {
    if (buffer_ != nullptr) record_.begin = record_.ready = trace_time(Clock::now());
  }
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;
  ~Span() {
    if (buffer_ == nullptr) return;
    record_.end = trace_time(Clock::now());
    buffer_->add(record_);
  }

  void describe(int32_t expert, int32_t row_block, int32_t rows) {
    record_.expert = expert;
    record_.row_block = row_block;
    record_.rows = rows;
  }
  // What came before was waiting.
  void ready() {
    if (buffer_ != nullptr) record_.ready = trace_time(Clock::now());
  }

 private:
  TraceBuffer* const buffer_;
  core::TraceRecord record_;
};

}  // namespace flashmoe::cpu
