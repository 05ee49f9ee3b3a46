// The protocol of one PE in one epoch, common to forward and backward: route, publish, plan,
// dispatch, results back to their slots, finish (kernels/core has the rules and their proofs).
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels/core/plan.h"
#include "kernels/core/tile_order.h"
#include "kernels/cpu/call.h"
#include "kernels/cpu/cores.h"
#include "kernels/cpu/heap.h"
#include "kernels/cpu/progress.h"
#include "kernels/cpu/simd/kernels.h"

namespace flashmoe::cpu {

// Ends a PE's part of a call; what() becomes the message of the exception that the user sees.
class CallError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Exchange {
 public:
  Exchange(const CallConfig& config, HeapGroup& heaps, int32_t me);

  // From now on a wait lasts until none of these devices has got on for as long as the deadline.
  void follow(std::vector<const Progress*> devices) { devices_ = std::move(devices); }
  // Groups my slots by expert, in token order. Throws CallError if an index is out of range or, if
  // the call asks for it, a weight is not finite.
  void route(const RoutedTokens& tokens);
  // Puts my counts into the heap of every PE.
  void publish();
  // Waits for the counts of every PE. This and the other waits give up the worker's core.
  void await_counts(Cores::Hold& core);
  // Computes from them where every row goes. `return_pieces` is the number of column pieces in
  // which a result row comes back.
  void plan(int32_t return_pieces);

  // Sends my rows of one dispatch step: row t of `rows`, and in backward the weight of the slot and
  // perhaps row t of `more_rows` too.
  template <typename S>
  void dispatch(int64_t step, const S* rows, const S* more_rows, const float* weights);
  // Waits until all rows of a row block are here.
  void await_rows(const core::Tile& tile, Cores::Hold& core);
  // Puts columns [column, column + columns) of the results of a row block, plus the bias of these
  // columns if there is one, into the slots they belong to; `results` is [rows in the block,
  // columns]. In backward the piece with column 0 brings the gradient of the slot's weight along,
  // else null.
  template <typename S>
  void put_back(const core::Tile& tile, int64_t column, simd::MatrixView<const float> results,
                int64_t columns, const S* bias, const float* weight_gradients);
  // Waits until all results of a block of my tokens are back.
  void await_results(int64_t token_block, Cores::Hold& core);

  // Waits until `count`, which a worker of this PE raises and rings the doorbell for, is
  // `expected`.
  void await_tiles(const core::Tile& tile, const std::atomic<int32_t>& count, int32_t expected,
                   Cores::Hold& core);

  // Makes my heap ready for the next epoch. Nobody touches it before I publish again.
  void finish();

  const core::Plan& current_plan() const { return plan_; }
  Heap& heap() { return heaps_[me_]; }
  int32_t me() const { return me_; }
  // True if the slot was neither masked nor dropped, and so has a result.
  bool is_kept(int64_t slot) const { return rank_[slot] >= 0; }
  int32_t dropped() const { return dropped_; }
  // First row and number of rows of a row block.
  int64_t first_row(const core::Tile& tile) const {
    return int64_t{tile.block} * config_.shape.block_rows;
  }
  int32_t rows(const core::Tile& tile) const {
    return plan_.rows_in_block(tile.expert, tile.block - plan_.first_block(tile.expert));
  }

 private:
  // Waits on my heap's doorbell, then for a core; throws CallError past the deadline, or when
  // another PE failed.
  template <typename Ready, typename Describe>
  void await(Cores::Hold& core, Urgency urgency, Ready ready, Describe describe);

  const CallConfig& config_;
  HeapGroup& heaps_;
  const int32_t me_;
  std::vector<const Progress*> devices_;
  core::Plan plan_{};
  std::vector<int32_t> start_, kept_, first_row_;  // the plan's arrays
  std::vector<int32_t> counts_;                    // [E] my rows for each expert
  std::vector<int32_t> sorted_;                    // my slots, grouped by expert, in token order
  std::vector<int32_t> group_;                     // [E + 1] where each expert's slots start in it
  std::vector<int32_t> rank_;     // [T * K] place among my slots of the expert; -1 if not kept
  std::vector<uint64_t> pieces_;  // [token blocks] what came_back must reach
  int32_t dropped_ = 0;
  Urgency load_ = 0;  // rows that my experts compute
};

}  // namespace flashmoe::cpu
