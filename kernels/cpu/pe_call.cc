#include "kernels/cpu/pe_call.h"

#include <algorithm>
#include <exception>

namespace flashmoe::cpu {

PeCall::PeCall(const CallConfig& config, HeapGroup& heaps, int32_t me, int32_t workers)
    : config_(config),
      shape_(config.shape),
      exchange_(config, heaps, me),
      heaps_(heaps),
      workers_(workers) {}

bool PeCall::run(int32_t index, Arena& arena) {
  try {
    Doorbell& doorbell = exchange_.heap().doorbell();
    if (index > 0) {
      // Worker 0 begins or fails within its own deadlines.
      const auto begun = [&] { return begun_.load() || heaps_.failed(); };
      while (!doorbell.wait(begun, Clock::now() + std::chrono::seconds(1))) {
      }
    }
    thread_local TileBuffers buffers;
    WorkerState worker{index, Cores::Hold(cores_), buffers};
    if (index == 0) {
      record_entry(trace_);
      begin(worker, arena);
      begun_.store(true);
      doorbell.ring();
    }
    if (begun_.load()) take_tasks(worker);
  } catch (const std::exception& error) {
    heaps_.fail(error.what());
  }
  if (left_.fetch_add(1) + 1 < workers_) return false;
  if (!heaps_.failed()) exchange_.finish();
  return true;
}

void PeCall::begin(WorkerState& worker, Arena& arena) {
  const TileCounts counts = tile_counts();
  {
    Span span(trace_, worker.index, core::Phase::kRoute);
    exchange_.route(tokens());
  }
  {
    Span span(trace_, worker.index, core::Phase::kPlan);
    exchange_.publish();
    exchange_.await_counts(worker.core);
    span.ready();
    exchange_.plan(shape_.hidden_tiles());
  }
  order_ = core::TileOrder{
      &exchange_.current_plan(), exchange_.me(), counts.first, counts.second, counts.weights, 1};
  const int64_t blocks = order_.blocks_before(shape_.local_experts());
  first_tiles_done_ = std::make_unique<std::atomic<int32_t>[]>(blocks);
  prepare(arena, blocks * shape_.block_rows);
}

void PeCall::take_tasks(WorkerState& worker) {
  const int64_t dispatches = core::dispatch_steps(shape_);
  const int64_t tiles = order_.size();
  const int64_t tasks = dispatches + tiles + shape_.token_blocks();
  for (int64_t i; (i = next_task_.fetch_add(1)) < tasks;) {
    if (progress_ != nullptr) progress_->note();
    if (i < dispatches) {
      const int32_t expert = core::dispatch_step(shape_, exchange_.me(), i).expert;
      const int32_t rows = exchange_.current_plan().kept_rows(exchange_.me(), expert);
      if (rows == 0) continue;
      Span span(trace_, worker.index, core::Phase::kDispatch);
      span.describe(expert, -1, rows);
      dispatch(i);
    } else if (i < dispatches + tiles) {
      tile(order_.at(i - dispatches), worker);
    } else {
      const int64_t block = i - dispatches - tiles;
      Span span(trace_, worker.index, core::Phase::kCombine);
      const int64_t first = block * shape_.block_tokens;
      span.describe(
          -1, static_cast<int32_t>(block),
          static_cast<int32_t>(std::min<int64_t>(shape_.block_tokens, shape_.tokens - first)));
      exchange_.await_results(block, worker.core);
      span.ready();
      combine(block);
    }
  }
}

void PeCall::tile(const core::Tile& tile, WorkerState& worker) {
  switch (tile.kind) {
    case core::TileKind::kFirst: {
      Span span(trace_, worker.index, core::Phase::kFirst);
      span.describe(tile.expert, tile.block, exchange_.rows(tile));
      exchange_.await_rows(tile, worker.core);
      span.ready();
      first_tile(tile, worker.buffers);
      first_tiles_done_[tile.block].fetch_add(1);
      exchange_.heap().doorbell().ring();
      return;
    }
    case core::TileKind::kSecond: {
      Span span(trace_, worker.index, core::Phase::kSecond);
      span.describe(tile.expert, tile.block, exchange_.rows(tile));
      await_first_tiles(tile, worker);
      span.ready();
      return second_tile(tile, worker.buffers);
    }
    case core::TileKind::kWeights: {
      Span span(trace_, worker.index, core::Phase::kWeights);
      const core::Plan& plan = exchange_.current_plan();
      span.describe(tile.expert, -1, plan.kept[tile.expert]);
      core::Tile block = tile;
      const int32_t first = plan.first_block(tile.expert);
      for (block.block = first; block.block < first + plan.blocks(tile.expert); ++block.block) {
        await_first_tiles(block, worker);
      }
      span.ready();
      return weight_tile(tile, worker.buffers);
    }
  }
}

void PeCall::await_first_tiles(const core::Tile& tile, WorkerState& worker) {
  exchange_.await_tiles(tile, first_tiles_done_[tile.block], order_.first_columns, worker.core);
}

}  // namespace flashmoe::cpu
