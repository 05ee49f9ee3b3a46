// Where everything lies in the symmetric heap of a PE. Equal on all PEs, so that an offset is a
// remote address.
#pragma once

#include <cstdint>

#include "kernels/core/host_device.h"
#include "kernels/core/shape.h"

namespace flashmoe::core {

// Who asked for a received row: slot = token * K + k of the source PE.
struct Origin {
  int32_t pe;
  int32_t slot;
};

// What an epoch moves.
struct Traffic {
  bool backward;     // gradients of the outputs travel, with the weights of their slots
  bool resend_rows;  // backward only: the rows of x travel too, since forward did not keep them
  int32_t element_bytes;

  friend bool operator==(const Traffic&, const Traffic&) = default;
};

// A part of the heap: [count] elements of `stride` bytes from `offset`, in bytes.
struct Section {
  int64_t offset;
  int64_t count;
  int64_t stride;

  FLASHMOE_HOST_DEVICE int64_t bytes() const { return count * stride; }
};

inline constexpr int64_t kSectionAlignment = 128;

// A section after the first `bytes` bytes, which then include it.
FLASHMOE_HOST_DEVICE inline Section append_section(int64_t& bytes, int64_t count, int64_t stride) {
  const Section section{bytes, count, stride};
  bytes = round_up(bytes + section.bytes(), kSectionAlignment);
  return section;
}

struct HeapLayout {
  Section counts;           // int32 [2][P][E]: rows each source wants to send
  Section counted;          // signal [2][P]: epoch and call-site tag of the counts of a source
  Section recv;             // element [R][H]: rows of x (forward) or of dy (backward)
  Section recv_x;           // element [R][H] or empty: rows of x sent again in backward
  Section origin;           // Origin [R]
  Section weight;           // float [R] or empty: slot weight of a row, backward
  Section arrived;          // signal [R / block_rows]: rows landed in a row block
  Section returned;         // element [T * K][H]: results at the slot that asked for them
  Section returned_weight;  // float [T * K] or empty: gradient of a slot's weight, backward
  Section came_back;        // signal [T / block_tokens]: pieces landed for a token block
  int64_t bytes;

  FLASHMOE_HOST_DEVICE HeapLayout(const Shape& shape, const Traffic& traffic) : bytes(0) {
    const int64_t rows = shape.recv_rows();
    const int64_t row_bytes = int64_t{shape.hidden} * traffic.element_bytes;
    constexpr int64_t kSignal = sizeof(uint64_t);
    counts = append_section(bytes, 2 * int64_t{shape.num_pes} * shape.num_experts, sizeof(int32_t));
    counted = append_section(bytes, 2 * int64_t{shape.num_pes}, kSignal);
    recv = append_section(bytes, rows, row_bytes);
    recv_x = append_section(bytes, traffic.resend_rows ? rows : 0, row_bytes);
    origin = append_section(bytes, rows, sizeof(Origin));
    weight = append_section(bytes, traffic.backward ? rows : 0, sizeof(float));
    arrived = append_section(bytes, shape.row_blocks(), kSignal);
    returned = append_section(bytes, shape.slots(), row_bytes);
    returned_weight = append_section(bytes, traffic.backward ? shape.slots() : 0, sizeof(float));
    came_back = append_section(bytes, shape.token_blocks(), kSignal);
  }
};

}  // namespace flashmoe::core
