// What the heap of a PE has beyond core::HeapLayout where some PE of the group is reached over the
// network (network_transport.h). Equal on all PEs.
#pragma once

#include <cstdint>

#include "kernels/core/heap_layout.h"
#include "kernels/core/shape.h"

namespace flashmoe::cuda {

// Received rows whose results are sent off together. A row block is a whole number of them, and so
// are the rows of a warp of either engine.
inline constexpr int32_t kRowsOfPart = 16;

struct NetworkLayout {
  core::Section outgoing{};  // element [T * K][H]: rows on their way, in the order of dispatch
  core::Section outgoing_origin{};  // Origin [T * K]: of each of them
  core::Section arrived{};          // signal [R / block_rows]: as HeapLayout::arrived, of such PEs
  core::Section came_back{};    // signal [T / block_tokens]: as HeapLayout::came_back, of such PEs
  core::Section second_done{};  // uint32 [R / kRowsOfPart]: second-stage pieces done of a part;
                                // only its own GPU touches it
  int64_t bytes = 0;            // of the whole heap

  NetworkLayout() = default;
  FLASHMOE_HOST_DEVICE NetworkLayout(const core::Shape& shape, const core::HeapLayout& heap)
      : bytes(heap.bytes) {
    constexpr int64_t kSignal = sizeof(uint64_t);
    outgoing = core::append_section(bytes, shape.slots(), heap.recv.stride);
    outgoing_origin = core::append_section(bytes, shape.slots(), sizeof(core::Origin));
    arrived = core::append_section(bytes, shape.row_blocks(), kSignal);
    came_back = core::append_section(bytes, shape.token_blocks(), kSignal);
    second_done = core::append_section(bytes, shape.recv_rows() / kRowsOfPart, sizeof(uint32_t));
  }
};

}  // namespace flashmoe::cuda
