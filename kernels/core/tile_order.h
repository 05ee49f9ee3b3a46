// The one fixed order in which the tiles of a PE are handed out by a ticket counter.
//
// Tiles come in two stages. A first-stage tile (up-projection; in backward the gradient of the
// pre-activations) needs only the rows of its row block. A second-stage tile (down-projection; in
// backward the gradient of the rows, and the weight gradients of the expert) needs all first-stage
// tiles of its row block or expert. Expert e's second stage follows the first stage of e + lag, so
// that those who take it rarely have to wait; with a lag of 1:
//
//     first(0) first(1) second(0) first(2) second(1) ... first(n-1) second(n-2) second(n-1)
//
// Every tile thus depends on lower tickets only: whoever holds the lowest unfinished ticket can
// always go on, and any number of workers, also one, ends. Inside a stage the row blocks that use
// one slice of the weights run together, for the caches.
#pragma once

#include <cstdint>

#include "kernels/core/host_device.h"
#include "kernels/core/plan.h"

namespace flashmoe::core {

enum class TileKind : int32_t { kFirst, kSecond, kWeights };

struct Tile {
  TileKind kind;
  int32_t expert;  // global index
  int32_t block;   // row block of the receive buffer; -1 for kWeights
  int32_t column;  // column tile; for kWeights which part of the expert's weights
};

struct TileOrder {
  const Plan* plan;
  int32_t pe;
  int32_t first_columns;   // first-stage tiles of a row block
  int32_t second_columns;  // second-stage tiles of a row block
  int32_t weight_tiles;    // weight-gradient tiles of an expert, also of one without rows
  int32_t lag;             // at least 1

  // Row blocks of local experts before `local`.
  FLASHMOE_HOST_DEVICE int64_t blocks_before(int32_t local) const {
    const int32_t n = plan->shape.local_experts();
    if (local < n) return plan->first_block(pe * n + local);
    const int32_t last = pe * n + n - 1;
    return plan->first_block(last) + plan->blocks(last);
  }
  FLASHMOE_HOST_DEVICE int64_t first_before(int32_t local) const {
    return blocks_before(local) * first_columns;
  }
  FLASHMOE_HOST_DEVICE int64_t second_before(int32_t local) const {
    return blocks_before(local) * second_columns + int64_t{local} * weight_tiles;
  }
  // Ticket of the first tile of first(i), or of second(i - lag) once there are no more experts.
  FLASHMOE_HOST_DEVICE int64_t turn_ticket(int32_t i) const {
    const int32_t n = plan->shape.local_experts();
    return first_before(i < n ? i : n) + second_before(i > lag ? i - lag : 0);
  }
  FLASHMOE_HOST_DEVICE int64_t size() const {
    const int32_t n = plan->shape.local_experts();
    return first_before(n) + second_before(n);
  }

  // The tile of a ticket, 0 <= ticket < size().
  FLASHMOE_HOST_DEVICE Tile at(int64_t ticket) const {
    const int32_t n = plan->shape.local_experts();
    // In turn i there are the tiles of first(i), then of second(i - lag), where there are such.
    int32_t low = 0;  // the last turn that starts at or before the ticket
    for (int32_t high = n + lag; high - low > 1;) {
      const int32_t middle = low + (high - low) / 2;
      (turn_ticket(middle) <= ticket ? low : high) = middle;
    }
    int64_t i = ticket - turn_ticket(low);
    const int64_t firsts = low < n ? first_before(low + 1) - first_before(low) : 0;
    if (i < firsts) return in_blocks(TileKind::kFirst, low, i);
    i -= firsts;
    const int32_t local = low - lag;
    const int64_t rows = (blocks_before(local + 1) - blocks_before(local)) * second_columns;
    if (i < rows) return in_blocks(TileKind::kSecond, local, i);
    const int32_t expert = pe * n + local;
    return Tile{TileKind::kWeights, expert, -1, static_cast<int32_t>(i - rows)};
  }

 private:
  FLASHMOE_HOST_DEVICE Tile in_blocks(TileKind kind, int32_t local, int64_t i) const {
    const int32_t expert = pe * plan->shape.local_experts() + local;
    const int32_t blocks = plan->blocks(expert);
    return Tile{kind, expert, plan->first_block(expert) + static_cast<int32_t>(i % blocks),
                static_cast<int32_t>(i / blocks)};
  }
};

// Whom a PE sends to, step by step: local expert 0 of every PE first, so that tiles can start while
// later experts are on the wire; own PE first, then rotated, so that no PE is hit by all at once.
struct DispatchStep {
  int32_t pe;
  int32_t expert;
};

FLASHMOE_HOST_DEVICE inline int64_t dispatch_steps(const Shape& shape) { return shape.num_experts; }

FLASHMOE_HOST_DEVICE inline DispatchStep dispatch_step(const Shape& shape, int32_t me,
                                                       int64_t step) {
  const int32_t pe = static_cast<int32_t>((me + step % shape.num_pes) % shape.num_pes);
  const int32_t local = static_cast<int32_t>(step / shape.num_pes);
  return DispatchStep{pe, pe * shape.local_experts() + local};
}

}  // namespace flashmoe::core
