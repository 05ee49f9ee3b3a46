// One PE's part of a call: its tasks, in one fixed order, taken by the PE's workers from a counter.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "kernels/core/tile_order.h"
#include "kernels/cpu/call.h"
#include "kernels/cpu/exchange.h"
#include "kernels/cpu/heap.h"
#include "kernels/cpu/trace.h"
#include "kernels/cpu/workspace.h"

namespace flashmoe::cpu {

// Tiles of a PE per row block, and per expert; see core::TileOrder.
struct TileCounts {
  int32_t first;
  int32_t second;
  int32_t weights;
};

// The tasks are: dispatch steps, expert tiles, combine blocks. A task waits for dispatch, which
// waits for nobody, or for lower tasks only, so one worker is enough and more are allowed.
class PeCall {
 public:
  PeCall(const CallConfig& config, HeapGroup& heaps, int32_t me, int32_t workers);
  // To be called, if at all, before the first run(). Workers that share cores compute on those
  // only; `mine` and `all` are of this PE's device and of those of all PEs.
  void record(CallTrace trace) { trace_ = std::move(trace); }
  void share(Cores& cores) { cores_ = &cores; }
  void follow(Progress& mine, std::vector<const Progress*> all) {
    progress_ = &mine;
    exchange_.follow(std::move(all));
  }
  virtual ~PeCall() = default;

  // To be called once by each of the PE's `workers`. True for the one that leaves last; by then the
  // results are written, or heaps.failed().
  bool run(int32_t worker, Arena& arena);

 protected:
  virtual const RoutedTokens& tokens() const = 0;
  virtual TileCounts tile_counts() const = 0;
  // Called once, as soon as the plan is known. Takes memory for the intermediate results of `rows`
  // rows.
  virtual void prepare(Arena& arena, int64_t rows) = 0;
  virtual void dispatch(int64_t step) = 0;
  virtual void first_tile(const core::Tile& tile, TileBuffers& buffers) = 0;
  virtual void second_tile(const core::Tile& tile, TileBuffers& buffers) = 0;
  virtual void weight_tile(const core::Tile& tile, TileBuffers& buffers) = 0;
  virtual void combine(int64_t token_block) = 0;

  const CallConfig& config_;
  const core::Shape& shape_;
  Exchange exchange_;

 private:
  // What a worker has for itself.
  struct WorkerState {
    int32_t index;
    Cores::Hold core;
    TileBuffers& buffers;
  };

  void begin(WorkerState& worker, Arena& arena);
  void take_tasks(WorkerState& worker);
  void tile(const core::Tile& tile, WorkerState& worker);
  void await_first_tiles(const core::Tile& tile, WorkerState& worker);

  HeapGroup& heaps_;
  const int32_t workers_;
  Cores* cores_ = nullptr;
  Progress* progress_ = nullptr;
  CallTrace trace_;
  core::TileOrder order_{};
  std::unique_ptr<std::atomic<int32_t>[]> first_tiles_done_;  // [row blocks]
  std::atomic<bool> begun_{false};
  std::atomic<int64_t> next_task_{0};
  std::atomic<int32_t> left_{0};
};

// Columns of a tile: [begin, begin + count).
struct Columns {
  int64_t begin;
  int64_t count;
};

inline Columns columns_of(const core::Tile& tile, const core::Shape& shape, int64_t width) {
  const int64_t begin = int64_t{tile.column} * shape.block_columns;
  return {begin, std::min<int64_t>(shape.block_columns, width - begin)};
}

std::unique_ptr<PeCall> make_forward(const CallConfig& config, HeapGroup& heaps, int32_t me,
                                     int32_t workers, const ForwardBuffers& buffers);
std::unique_ptr<PeCall> make_backward(const CallConfig& config, HeapGroup& heaps, int32_t me,
                                      int32_t workers, const BackwardBuffers& buffers);

}  // namespace flashmoe::cpu
