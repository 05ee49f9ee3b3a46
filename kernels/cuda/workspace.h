// The memory of one PE that only its own GPU touches. Like the heap it outlives a launch: control
// words are zero when it is made, and the last CTA of a launch leaves them as the next one expects
// them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/core/heap_layout.h"
#include "kernels/core/plan.h"
#include "kernels/core/shape.h"

namespace flashmoe::cuda {

// Where a PE was when it failed. Python's error messages say the same in words.
enum class Failure : uint32_t {
  kNone,
  kBadIndex,     // of slot `expected`: the index `seen`
  kBadWeight,    // of slot `expected`: not finite
  kBarrier,      // CTAs of this PE
  kCounts,       // row counts of PE `awaited`
  kOtherCall,    // PE `awaited` executes another call: its word is `seen`
  kRows,         // rows of row block `awaited`
  kFirstStage,   // first-stage tiles of row block `awaited`
  kSecondStage,  // second-stage tiles of the `awaited`-th kRowsOfPart received rows
  kResults,      // results of token `awaited`
};

// Written by the first thread of a PE that fails, `failure` last.
struct ErrorRecord {
  uint32_t failure;  // a Failure
  int32_t pe;        // whose wait it was
  int64_t awaited;
  uint64_t expected;
  uint64_t seen;
};

struct Control {
  uint32_t epoch;    // of the last launch
  uint32_t failed;   // not 0: a thread of this PE gave up, and all others must
  uint32_t barrier;  // arrivals of CTAs
  uint32_t exits;    // CTAs that are done
  uint64_t ticket;   // the next tile
};

struct WorkspaceLayout {
  core::Section control;     // Control
  core::Section cta_counts;  // int32 [G][E]: rows for each expert from the tokens of a CTA
  core::Section position;    // int32 [T * K]: of a slot among this PE's rows of its expert
  core::Section send;        // int32 [T * K]: slots, in the order in which they are dispatched
  core::Section start;       // int32 [P][E]: see core::Plan
  core::Section kept;        // int32 [E]
  core::Section first_row;   // int32 [E]
  core::Section first_done;  // uint32 [R / block_rows]: first-stage pieces done of a row block
  core::Section activated;   // element [R][D]: what the second stage reads
  int64_t bytes;

  FLASHMOE_HOST_DEVICE WorkspaceLayout(const core::Shape& shape, int32_t ctas,
                                       int32_t element_bytes)
      : bytes(0) {
    constexpr int64_t kInt = sizeof(int32_t);
    control = core::append_section(bytes, 1, sizeof(Control));
    cta_counts = core::append_section(bytes, int64_t{ctas} * shape.num_experts, kInt);
    position = core::append_section(bytes, shape.slots(), kInt);
    send = core::append_section(bytes, shape.slots(), kInt);
    start = core::append_section(bytes, int64_t{shape.num_pes} * shape.num_experts, kInt);
    kept = core::append_section(bytes, shape.num_experts, kInt);
    first_row = core::append_section(bytes, shape.num_experts, kInt);
    first_done = core::append_section(bytes, shape.row_blocks(), kInt);
    activated =
        core::append_section(bytes, shape.recv_rows(), int64_t{shape.intermediate} * element_bytes);
  }
};

}  // namespace flashmoe::cuda
