#include "kernels/cpu/exchange.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "kernels/core/epoch.h"

namespace flashmoe::cpu {
namespace {

std::string seconds(std::chrono::nanoseconds time) {
  std::string text = std::to_string(std::chrono::duration<double>(time).count());
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  return text + " s";
}

}  // namespace

Exchange::Exchange(const CallConfig& config, HeapGroup& heaps, int32_t me)
    : config_(config), heaps_(heaps), me_(me) {}

template <typename Ready, typename Describe>
void Exchange::await(Cores::Hold& core, Urgency urgency, Ready ready, Describe describe) {
  const auto done = [&] { return heaps_.failed() || ready(); };
  bool in_time = done();
  if (!in_time) {
    const Cores::Break pause(core, urgency);
    Clock::time_point last = Clock::now(), deadline;
    do {
      deadline = last + config_.deadline;
      in_time = heap().doorbell().wait(done, deadline);
      for (const Progress* device : devices_) last = std::max(last, device->last());
    } while (!in_time && last + config_.deadline > deadline);
  }
  if (heaps_.failed()) throw CallError(heaps_.failure());
  if (!in_time) {
    throw CallError("PE " + std::to_string(me_) + ": " + describe() + " after " +
                    seconds(config_.deadline) +
                    " (the deadline: FLASHMOE_DEADLINE_SECONDS or MoEConfig.deadline_seconds)");
  }
}

void Exchange::route(const RoutedTokens& tokens) {
  const core::Shape& shape = config_.shape;
  const int64_t slots = shape.slots();
  const int32_t experts = shape.num_experts;
  const auto where = [&](int64_t slot) {
    return "PE " + std::to_string(me_) + ", token " +
           std::to_string(slot / shape.experts_per_token) + ", slot " +
           std::to_string(slot % shape.experts_per_token);
  };
  counts_.assign(experts, 0);
  rank_.assign(slots, -1);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int32_t expert = tokens.indices[slot];
    if (expert < -1 || expert >= experts) {
      throw CallError("expert index " + std::to_string(expert) + " (" + where(slot) +
                      ") is out of range: allowed are 0 to " + std::to_string(experts - 1) +
                      ", and -1 for a masked slot");
    }
    if (expert < 0) continue;
    if (config_.check_weights && !std::isfinite(tokens.weights[slot])) {
      throw CallError("expert weight " + std::to_string(tokens.weights[slot]) + " (" + where(slot) +
                      ") is not finite: mask the slot with index -1 instead");
    }
    rank_[slot] = counts_[expert]++;
  }
  group_.assign(experts + 1, 0);
  for (int32_t e = 0; e < experts; ++e) group_[e + 1] = group_[e] + counts_[e];
  sorted_.resize(group_[experts]);
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (rank_[slot] >= 0) {
      sorted_[group_[tokens.indices[slot]] + rank_[slot]] = static_cast<int32_t>(slot);
    }
  }
}

void Exchange::publish() {
  const core::Shape& shape = config_.shape;
  const uint32_t epoch = heaps_.epoch();
  const int64_t half = core::parity(epoch) * int64_t{shape.num_pes};
  for (int32_t i = 0; i < shape.num_pes; ++i) {
    Heap& peer = heaps_[(me_ + i) % shape.num_pes];
    std::copy(counts_.begin(), counts_.end(), peer.counts() + (half + me_) * shape.num_experts);
    peer.counted()[half + me_].store(core::counted_word(config_.tag, epoch));
    peer.doorbell().ring();
  }
}

void Exchange::await_counts(Cores::Hold& core) {
  const core::Shape& shape = config_.shape;
  const uint32_t epoch = heaps_.epoch();
  const int64_t half = core::parity(epoch) * int64_t{shape.num_pes};
  for (int32_t pe = 0; pe < shape.num_pes; ++pe) {
    const Signal& counted = heap().counted()[half + pe];
    const auto judge = [&] { return core::judge_counted(counted.load(), config_.tag, epoch); };
    const auto describe = [&](const char* what) {
      const uint64_t seen = counted.load();
      return std::string(what) + " PE " + std::to_string(pe) + " in phase plan: expected epoch " +
             std::to_string(epoch) + " of call site " + std::to_string(config_.tag) +
             ", seen epoch " + std::to_string(core::epoch_of(seen)) + " of call site " +
             std::to_string(core::tag_of(seen));
    };
    await(
        core, kUrgent, [&] { return judge() != core::Counted::kNotYet; },
        [&] { return describe("no counts from"); });
    if (judge() == core::Counted::kOtherCall) {
      throw CallError("PE " + std::to_string(me_) + ": " + describe("another call by"));
    }
  }
}

void Exchange::plan(int32_t return_pieces) {
  const core::Shape& shape = config_.shape;
  const int64_t half = core::parity(heaps_.epoch()) * int64_t{shape.num_pes};
  start_.resize(int64_t{shape.num_pes} * shape.num_experts);
  kept_.resize(shape.num_experts);
  first_row_.resize(shape.num_experts);
  plan_ = core::Plan{shape,
                     heap().counts() + half * shape.num_experts,
                     start_.data(),
                     kept_.data(),
                     first_row_.data(),
                     0};
  core::build_plan(plan_);
  load_ = 0;
  for (int32_t e = 0; e < shape.local_experts(); ++e) {
    load_ += plan_.kept[me_ * shape.local_experts() + e];
  }

  const int64_t slots_per_block = int64_t{shape.block_tokens} * shape.experts_per_token;
  pieces_.assign(shape.token_blocks(), 0);
  dropped_ = 0;
  for (int32_t e = 0; e < shape.num_experts; ++e) {
    const int32_t kept = plan_.kept_rows(me_, e);
    for (int32_t i = 0; i < counts_[e]; ++i) {
      const int32_t slot = sorted_[group_[e] + i];
      if (i < kept) {
        pieces_[slot / slots_per_block] += return_pieces;
      } else {
        rank_[slot] = -1;
        ++dropped_;
      }
    }
  }
}

template <typename S>
void Exchange::dispatch(int64_t step, const S* rows, const S* more_rows, const float* weights) {
  const core::Shape& shape = config_.shape;
  const auto [pe, expert] = core::dispatch_step(shape, me_, step);
  const int32_t count = plan_.kept_rows(me_, expert);
  if (count == 0) return;
  Heap& peer = heaps_[pe];
  const int64_t first = plan_.place(me_, expert);
  const int64_t hidden = shape.hidden;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t slot = sorted_[group_[expert] + i];
    const int64_t token = slot / shape.experts_per_token;
    const int64_t place = first + i;
    std::copy_n(rows + token * hidden, hidden, peer.recv<S>() + place * hidden);
    if (more_rows != nullptr) {
      std::copy_n(more_rows + token * hidden, hidden, peer.recv_x<S>() + place * hidden);
    }
    if (weights != nullptr) peer.weight()[place] = weights[slot];
    peer.origin()[place] = core::Origin{me_, slot};
  }
  for (int64_t row = first; row < first + count;) {
    const int64_t block = row / shape.block_rows;
    const int64_t end = std::min<int64_t>(first + count, (block + 1) * shape.block_rows);
    peer.arrived()[block].fetch_add(static_cast<uint64_t>(end - row));
    row = end;
  }
  peer.doorbell().ring();
}

void Exchange::await_rows(const core::Tile& tile, Cores::Hold& core) {
  const Signal& arrived = heap().arrived()[tile.block];
  const uint64_t expected = static_cast<uint64_t>(rows(tile));
  await(
      core, load_, [&] { return arrived.load() == expected; },
      [&] {
        std::string sources;
        for (int32_t pe = 0; pe < config_.shape.num_pes; ++pe) {
          if (plan_.kept_rows(pe, tile.expert) > 0) {
            sources.append(" ").append(std::to_string(pe));
          }
        }
        return "rows missing in phase expert for expert " + std::to_string(tile.expert) +
               ", row block " + std::to_string(tile.block) + ", awaited from PEs" + sources +
               ": expected " + std::to_string(expected) + " rows, seen " +
               std::to_string(arrived.load());
      });
}

template <typename S>
void Exchange::put_back(const core::Tile& tile, int64_t column,
                        simd::MatrixView<const float> results, int64_t columns, const S* bias,
                        const float* weight_gradients) {
  const auto round_row = simd::kernels<S>().round_row;
  const core::Shape& shape = config_.shape;
  const int64_t slots_per_block = int64_t{shape.block_tokens} * shape.experts_per_token;
  const core::Origin* origin = heap().origin() + first_row(tile);
  const int32_t count = rows(tile);
  // The rows of a block lie in global token order, so runs of them go to one token block, and one
  // signal serves a run.
  for (int32_t r = 0; r < count;) {
    const int32_t pe = origin[r].pe;
    const int64_t token_block = origin[r].slot / slots_per_block;
    Heap& peer = heaps_[pe];
    const int32_t begin = r;
    for (; r < count && origin[r].pe == pe && origin[r].slot / slots_per_block == token_block;
         ++r) {
      const int64_t slot = origin[r].slot;
      round_row(results.data + r * results.stride, bias,
                peer.returned<S>() + slot * shape.hidden + column, columns);
      if (weight_gradients != nullptr) peer.returned_weight()[slot] = weight_gradients[r];
    }
    peer.came_back()[token_block].fetch_add(static_cast<uint64_t>(r - begin));
    peer.doorbell().ring();
  }
}

void Exchange::await_results(int64_t token_block, Cores::Hold& core) {
  const Signal& came_back = heap().came_back()[token_block];
  const uint64_t expected = pieces_[token_block];
  await(
      core, kUrgent, [&] { return came_back.load() == expected; },
      [&] {
        const core::Shape& shape = config_.shape;
        std::string owners;
        for (int32_t pe = 0; pe < shape.num_pes; ++pe) {
          bool sent = false;
          for (int32_t e = pe * shape.local_experts(); e < (pe + 1) * shape.local_experts(); ++e) {
            sent |= plan_.kept_rows(me_, e) > 0;
          }
          if (sent) owners.append(" ").append(std::to_string(pe));
        }
        return "results missing in phase combine for token block " + std::to_string(token_block) +
               ", awaited from PEs" + owners + ": expected " + std::to_string(expected) +
               " pieces, seen " + std::to_string(came_back.load());
      });
}

void Exchange::await_tiles(const core::Tile& tile, const std::atomic<int32_t>& count,
                           int32_t expected, Cores::Hold& core) {
  await(
      core, load_, [&] { return count.load() == expected; },
      [&] {
        return "tiles missing in phase expert for expert " + std::to_string(tile.expert) +
               ", awaited from PE " + std::to_string(me_) + " itself: expected " +
               std::to_string(expected) + ", seen " + std::to_string(count.load());
      });
}

void Exchange::finish() {
  const core::Shape& shape = config_.shape;
  for (int64_t i = 0; i < shape.row_blocks(); ++i) {
    heap().arrived()[i].store(0, std::memory_order_relaxed);
  }
  for (int64_t i = 0; i < shape.token_blocks(); ++i) {
    heap().came_back()[i].store(0, std::memory_order_relaxed);
  }
}

template void Exchange::dispatch(int64_t, const float*, const float*, const float*);
template void Exchange::dispatch(int64_t, const BFloat16*, const BFloat16*, const float*);
template void Exchange::dispatch(int64_t, const Float16*, const Float16*, const float*);
template void Exchange::put_back(const core::Tile&, int64_t, simd::MatrixView<const float>, int64_t,
                                 const float*, const float*);
template void Exchange::put_back(const core::Tile&, int64_t, simd::MatrixView<const float>, int64_t,
                                 const BFloat16*, const float*);
template void Exchange::put_back(const core::Tile&, int64_t, simd::MatrixView<const float>, int64_t,
                                 const Float16*, const float*);

}  // namespace flashmoe::cpu
