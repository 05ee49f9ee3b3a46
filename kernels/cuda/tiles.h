// Step 5 of an epoch, the producer's side: tiles are taken in their one fixed order, what they need
// is awaited, and their operands are loaded. Each tile is announced to the other warps of the CTA
// through a ring of two places, so that the next one is loaded while this one is finished.
#pragma once

#include <cstdint>

#include "kernels/core/tile_order.h"
#include "kernels/cuda/comm_group.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/pipeline.h"
#include "kernels/cuda/product.h"
#include "kernels/cuda/wait.h"
#include "kernels/device/mbarrier.h"
#include "kernels/device/warp.h"

namespace flashmoe::cuda {

// A tile, as the warps of a CTA hand it on.
struct TileWork {
  core::TileKind kind;
  int32_t expert;  // local
  int32_t block;
  int32_t column;  // column tile
  int32_t rows;    // of the block; 0: there are no more tiles
};

inline constexpr int kTilesAhead = 2;

struct TileRing {
  TileWork tiles[kTilesAhead];
  device::Mbarrier announced[kTilesAhead];
  device::Mbarrier taken[kTilesAhead];
};

// By all lanes of a warp that is not the leading producer: the next tile of the CTA, which stays
// where it is until it is given back.
FLASHMOE_DEVICE const TileWork& await_tile(TileRing& ring,
                                           const PipelinePosition<kTilesAhead>& place) {
  device::mbarrier_wait(&ring.announced[place.stage()], place.full_parity());
  return ring.tiles[place.stage()];
}
FLASHMOE_DEVICE void give_back_tile(TileRing& ring, PipelinePosition<kTilesAhead>& place) {
  device::warp_sync();
  if (device::lane_index() == 0) device::mbarrier_arrive(&ring.taken[place.stage()]);
  place.advance();
}

// Everything about tiles that depends on the engine and the transport.
template <typename Engine, typename Transport>
struct Tiles {
  const Context& context;

  // Signals of one tile for one row, or one row block: each warp that has a part of it sends one.
  static constexpr int kPiecesOfRow =
      Engine::kMathWarps * Engine::kRowFragments * 16 / Engine::kBlockRows;
  static constexpr int kPiecesOfTile = Engine::kMathWarps;

  FLASHMOE_DEVICE bool gated() const { return context.pe.gate != nullptr; }

  // Result columns of a tile.
  FLASHMOE_DEVICE int32_t first_stage_columns() const {
    return gated() ? Engine::kColumns / 2 : Engine::kColumns;
  }
  FLASHMOE_DEVICE int32_t first_stage_tiles() const {
    return static_cast<int32_t>(
        core::ceil_div(context.shape().intermediate, first_stage_columns()));
  }

  FLASHMOE_DEVICE int32_t depth(const TileWork& tile) const {
    const core::Shape& shape = context.shape();
    return tile.kind == core::TileKind::kFirst ? shape.hidden : shape.intermediate;
  }
  FLASHMOE_DEVICE Product product(const TileWork& tile) const {
    const core::Shape& shape = context.shape();
    const PeArguments& pe = context.pe;
    Product product;
    product.row = tile.block * Engine::kBlockRows;
    product.row_count = tile.rows;
    product.expert = tile.expert;
    product.depth = depth(tile);
    if (tile.kind == core::TileKind::kFirst) {
      const Operand up{pe.up, &pe.maps.up};
      product.rows = {context.heap<void>(context.rank, context.arguments.heap.recv),
                      &pe.maps.received};
      product.even = gated() ? Operand{pe.gate, &pe.maps.gate} : up;
      product.odd = up;
      product.width = shape.intermediate;
      product.column = tile.column * first_stage_columns();
      product.gated = gated();
    } else {
      product.rows = {context.workspace<void>(context.arguments.workspace.activated),
                      &pe.maps.activated};
      product.even = product.odd = Operand{pe.down, &pe.maps.down};
      product.width = shape.hidden;
      product.column = tile.column * Engine::kColumns;
      product.gated = false;
    }
    return product;
  }

  // Waits for what the tile reads; false if the PE has failed. By one thread.
  FLASHMOE_DEVICE bool wait_for_operands(const TileWork& tile) const {
    if (tile.kind == core::TileKind::kFirst) {
      return Transport::wait_for_rows(context, tile.block, static_cast<uint64_t>(tile.rows));
    }
    return wait_for_count<device::Scope::kGpu>(
        context, context.first_done(tile.block),
        static_cast<uint64_t>(first_stage_tiles()) * kPiecesOfTile, Failure::kFirstStage,
        tile.block);
  }
};

// By all producer warps.
template <typename Engine, typename Transport>
struct TileProducer {
  Tiles<Engine, Transport> tiles;
  typename Engine::Shared& shared;
  TileRing& ring;
  PlanShared& plan_shared;

  // The first warp decides, the others follow it through the ring as the math warps do. Without a
  // plan there are no tiles.
  FLASHMOE_DEVICE void run(int producer_warp, bool has_plan) const {
    if (producer_warp == 0) {
      lead(has_plan);
    } else {
      follow();
    }
  }

 private:
  // In lane 0.
  FLASHMOE_DEVICE uint64_t take_ticket() const {
    if (device::lane_index() != 0) return 0;
    return device::fetch_add_relaxed<device::Scope::kGpu>(&tiles.context.control()->ticket,
                                                          uint64_t{1});
  }
  FLASHMOE_DEVICE static int64_t of_all_lanes(uint64_t ticket) {
    return device::shuffle(static_cast<int64_t>(ticket), 0);
  }

  // Between the first stage of an expert and its second there are on average so many tiles that
  // each CTA has had one or two: by then the first stage is rarely unfinished.
  FLASHMOE_DEVICE int32_t lag(int64_t num_tiles) const {
    const int64_t experts = tiles.context.shape().local_experts();
    const int64_t wanted = core::ceil_div(2 * tiles.context.arguments.ctas * experts,
                                          num_tiles > 0 ? num_tiles : int64_t{1});
    return static_cast<int32_t>(wanted < 1 ? 1 : (wanted < experts ? wanted : experts));
  }

  FLASHMOE_DEVICE void announce(const TileWork& tile, PipelinePosition<kTilesAhead>& place) const {
    device::mbarrier_wait(&ring.taken[place.stage()], place.empty_parity());
    // A lane that were late would find the next phase of the barrier and wait for its end.
    device::warp_sync();
    if (device::lane_index() == 0) {
      ring.tiles[place.stage()] = tile;
      device::mbarrier_arrive(&ring.announced[place.stage()]);
    }
    device::warp_sync();
    place.advance();
  }

  FLASHMOE_DEVICE void lead(bool has_plan) const {
    const Context& context = tiles.context;
    const core::Plan plan = plan_shared.in_shared(context.plan());
    core::TileOrder order{
        .plan = &plan,
        .pe = context.rank,
        .first_columns = tiles.first_stage_tiles(),
        .second_columns = context.shape().hidden_tiles(),
        .weight_tiles = 0,
        .lag = 1,
    };
    if (has_plan) order.lag = lag(order.size());
    typename Engine::Producer producer;
    PipelinePosition<kTilesAhead> place;
    const int64_t count = has_plan ? order.size() : 0;
    for (int64_t ticket = of_all_lanes(take_ticket()); ticket < count;) {
      const core::Tile at = order.at(ticket);
      TileWork tile{at.kind, at.expert - context.rank * context.shape().local_experts(), at.block,
                    at.column,
                    plan.rows_in_block(at.expert, at.block - plan.first_block(at.expert))};
      if (!device::all(device::lane_index() != 0 || tiles.wait_for_operands(tile))) break;
      device::warp_sync();
      device::fence_proxy_async();
      // The next ticket is taken before this tile is loaded, so that its answer is there when it is
      // needed. It is still true that whoever works on the lowest unfinished ticket can go on.
      const uint64_t next = take_ticket();
      announce(tile, place);
      producer.load(shared, tiles.product(tile));
      ticket = of_all_lanes(next);
    }
    announce(TileWork{}, place);
  }

  FLASHMOE_DEVICE void follow() const {
    typename Engine::Producer producer;
    PipelinePosition<kTilesAhead> place;
    for (;;) {
      const TileWork& tile = await_tile(ring, place);
      if (tile.rows == 0) return;
      producer.load(shared, tiles.product(tile));
      give_back_tile(ring, place);
    }
  }
};

}  // namespace flashmoe::cuda
