// The protocol without the engine: PEs on threads of the test's own.
#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <chrono>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/core/epoch.h"
#include "kernels/cpu/exchange.h"
#include "kernels/cpu/heap.h"
#include "kernels/cpu/pe_call.h"
#include "tests/native/harness.h"
#include "tests/native/problem.h"

namespace flashmoe::testing {
namespace {

using core::Counted;
using cpu::Arena;
using cpu::Exchange;
using cpu::HeapGroup;
using cpu::PeCall;

// Every PE gets rows from every PE.
Layer layer_of(int32_t num_pes) {
  return {
      .shape = {.num_pes = num_pes,
                .tokens = 24,
                .hidden = 5,
                .intermediate = 4,
                .num_experts = 2 * num_pes,
                .experts_per_token = 2,
                .capacity = core::kNoCapacity,
                .max_rows = 24 * 2 * num_pes,
                .block_rows = 4,
                .block_tokens = 3,
                .block_columns = 2},
      .dtype = cpu::DType::kFloat32,
      .activation = cpu::Activation::kGelu,
      .gated = false,
      .biased = false,
      .save_rows = false,
      .save_preactivations = false,
  };
}

std::unique_ptr<PeCall> make_call(const cpu::CallConfig& config, HeapGroup& heaps, int32_t me,
                                  int32_t workers, const Problem& problem) {
  if (config.traffic.backward) {
    return cpu::make_backward(config, heaps, me, workers, problem.backward_buffers(me));
  }
  return cpu::make_forward(config, heaps, me, workers, problem.forward_buffers(me));
}

void counted_words(uint64_t) {
  const uint32_t last = 0xffffffffu;
  for (uint32_t epoch : {1u, 2u, 3u, 1000u, last - 1, last, 0u}) {
    const auto judge = [&](uint32_t tag, uint32_t seen_epoch) {
      return core::judge_counted(core::counted_word(tag, seen_epoch), 7, epoch);
    };
    check(judge(7, epoch) == Counted::kHere, "the awaited epoch must be recognised");
    check(judge(7, epoch - 2) == Counted::kNotYet, "the epoch before of equal parity is no news");
    check(judge(9, epoch - 2) == Counted::kNotYet, "another site may have used the heap before");
    check(judge(9, epoch) == Counted::kOtherCall, "another site must be recognised");
    check(judge(7, epoch + 2) == Counted::kOtherCall, "a later epoch must be recognised");
    check(core::judge_counted(0, 7, epoch) == Counted::kNotYet, "a new heap says nothing");
  }
}

// Thousands of epochs on one set of heaps, with routings that alternate: a signal that was not
// zeroed, or counts of the wrong parity, would show.
void many_epochs(bool backward, int32_t workers, uint64_t seed) {
  constexpr int32_t kPes = 3;
  constexpr int kEpochs = 2000;
  Layer layer = layer_of(kPes);
  layer.shape.tokens = 4;
  std::vector<Problem> problems;
  for (Routing routing : {Routing::kDistinct, Routing::kAllToOne, Routing::kSomePesMasked}) {
    problems.emplace_back(layer, routing, seed + problems.size());
  }
  const cpu::CallConfig config = problems[0].config(backward);
  HeapGroup heaps(config.shape, config.traffic);
  std::vector<Arena> arenas(kPes);
  std::vector<std::unique_ptr<PeCall>> calls(kPes);
  std::vector<std::vector<std::byte>> expected(problems.size());
  std::string failure;
  int epoch = -1;
  const auto next_epoch = [&]() noexcept {
    if (epoch >= 0) {
      Problem& problem = problems[static_cast<size_t>(epoch) % problems.size()];
      std::vector<std::byte>& first = expected[static_cast<size_t>(epoch) % problems.size()];
      const std::vector<std::byte> results = problem.result_bytes(backward);
      if (first.empty()) first = results;
      if (results != first) failure = "epoch " + std::to_string(epoch) + " has other results";
      if (heaps.failed()) failure = heaps.failure();
      for (int32_t pe = 0; pe < kPes; ++pe) {
        uint64_t left = 0;
        for (int64_t i = 0; i < config.shape.row_blocks(); ++i) left |= heaps[pe].arrived()[i];
        for (int64_t i = 0; i < config.shape.token_blocks(); ++i) left |= heaps[pe].came_back()[i];
        if (left != 0) failure = "signals are left after epoch " + std::to_string(epoch);
      }
      problem.clear_results();
    }
    ++epoch;
    heaps.next_epoch();
    for (int32_t pe = 0; pe < kPes; ++pe) {
      calls[static_cast<size_t>(pe)] = make_call(
          config, heaps, pe, workers, problems[static_cast<size_t>(epoch) % problems.size()]);
    }
  };
  std::barrier barrier(kPes * workers, next_epoch);
  on_threads(kPes * workers, [&](int thread) {
    const size_t pe = static_cast<size_t>(thread / workers);
    for (int i = 0; i <= kEpochs; ++i) {
      barrier.arrive_and_wait();
      if (!failure.empty() || i == kEpochs) return;
      calls[pe]->run(thread % workers, arenas[pe]);
    }
  });
  check(failure.empty(), failure);
}

constexpr std::chrono::milliseconds kShortDeadline{300};

// How far a PE gets in a call before it dies.
enum class Death { kBeforePublish, kBeforeDispatch, kBeforeExperts };

// What the other PEs say of it. Every PE fails, and not much later than the deadline.
std::string message_of_survivors(Death death, bool backward, uint64_t seed) {
  constexpr int32_t kPes = 4, kDead = 2;
  Problem problem(layer_of(kPes), Routing::kDistinct, seed);
  problem.deadline = kShortDeadline;
  const cpu::CallConfig config = problem.config(backward);
  HeapGroup heaps(config.shape, config.traffic);
  heaps.next_epoch();
  const cpu::Clock::time_point begin = cpu::Clock::now();
  on_threads(kPes, [&](int pe) {
    if (pe != kDead) {
      Arena arena;
      check(make_call(config, heaps, pe, 1, problem)->run(0, arena), "the only worker is the last");
      check(heaps.failed(), "PE " + std::to_string(pe) + " ended well without PE 2");
      return;
    }
    if (death == Death::kBeforePublish) return;
    Exchange exchange(config, heaps, pe);
    const cpu::BackwardBuffers buffers = problem.backward_buffers(pe);
    exchange.route(buffers.tokens);
    exchange.publish();
    cpu::Cores::Hold core(nullptr);
    exchange.await_counts(core);
    exchange.plan(config.shape.hidden_tiles());
    if (death == Death::kBeforeDispatch) return;
    const float* x = static_cast<const float*>(buffers.tokens.x);
    const float* dy = static_cast<const float*>(buffers.dy);
    for (int64_t step = 0; step < core::dispatch_steps(config.shape); ++step) {
      exchange.dispatch(step, backward ? dy : x, backward ? x : nullptr,
                        backward ? buffers.tokens.weights : nullptr);
    }
  });
  check(cpu::Clock::now() - begin < kShortDeadline + std::chrono::seconds(20),
        "the survivors waited for long past the deadline");
  return heaps.failure();
}

// That a message names PE 2 among those from whom something is awaited.
void check_awaits_pe_2(const std::string& message) {
  const std::string before = "awaited from PEs";
  const size_t begin = message.find(before);
  check(begin != std::string::npos, "nobody is awaited in the message '" + message + "'");
  const size_t end = message.find(':', begin);
  const std::string pes = message.substr(begin + before.size(), end - begin - before.size());
  check((pes + " ").find(" 2 ") != std::string::npos, "PE 2 is not awaited in '" + message + "'");
}

void dies_before_publish(uint64_t seed) {
  for (bool backward : {false, true}) {
    check_contains(message_of_survivors(Death::kBeforePublish, backward, seed),
                   {"no counts from PE 2 in phase plan", "expected epoch 1 of call site 1",
                    "seen epoch 0 of call site 0", "after 0.3 s"});
  }
}

void dies_before_dispatch(uint64_t seed) {
  for (bool backward : {false, true}) {
    const std::string message = message_of_survivors(Death::kBeforeDispatch, backward, seed);
    check_contains(message, {"rows missing in phase expert for expert ", ": expected ",
                             " rows, seen ", "after 0.3 s"});
    check_awaits_pe_2(message);
  }
}

void dies_before_experts(uint64_t seed) {
  for (bool backward : {false, true}) {
    const std::string message = message_of_survivors(Death::kBeforeExperts, backward, seed);
    check_contains(message, {"results missing in phase combine for token block ", ": expected ",
                             " pieces, seen ", "after 0.3 s"});
    check_awaits_pe_2(message);
  }
}

// A PE whose up-projection tiles do what the test says, and whose results are zeros.
class ScriptedCall final : public PeCall {
 public:
  ScriptedCall(const cpu::CallConfig& config, HeapGroup& heaps, int32_t me, int32_t workers,
               const Problem& problem, std::function<void()> script)
      : PeCall(config, heaps, me, workers),
        buffers_(problem.forward_buffers(me)),
        script_(std::move(script)) {}

 private:
  const cpu::RoutedTokens& tokens() const override { return buffers_.tokens; }
  cpu::TileCounts tile_counts() const override { return {1, shape_.hidden_tiles(), 0}; }
  void prepare(Arena&, int64_t) override {}
  void dispatch(int64_t step) override {
    exchange_.dispatch<float>(step, static_cast<const float*>(buffers_.tokens.x), nullptr, nullptr);
  }
  void first_tile(const core::Tile&, cpu::TileBuffers&) override { script_(); }
  void second_tile(const core::Tile& tile, cpu::TileBuffers& buffers) override {
    const auto [begin, count] = cpu::columns_of(tile, shape_, shape_.hidden);
    float* zeros = buffers.reserve<float>(0, exchange_.rows(tile) * count);
    std::fill_n(zeros, exchange_.rows(tile) * count, 0.0f);
    exchange_.put_back<float>(tile, begin, {zeros, count}, count, nullptr, nullptr);
  }
  void weight_tile(const core::Tile&, cpu::TileBuffers&) override {}
  void combine(int64_t) override {}

  const cpu::ForwardBuffers buffers_;
  const std::function<void()> script_;
};

// PEs that take turns on one core: the first is through long before the last, and waits for it for
// longer than the deadline. That is no fault, since the others get on. But one that never gets on
// is found out, a deadline after the others have stopped.
void slow_is_not_dead(uint64_t seed) {
  constexpr int32_t kPes = 3;
  Problem problem(layer_of(kPes), Routing::kDistinct, seed);
  problem.deadline = kShortDeadline;
  const cpu::CallConfig config = problem.config(false);
  for (bool one_hangs : {false, true}) {
    HeapGroup heaps(config.shape, config.traffic);
    heaps.next_epoch();
    cpu::Cores cores(1);
    std::vector<cpu::Progress> devices(kPes);
    std::vector<const cpu::Progress*> all;
    for (const cpu::Progress& device : devices) all.push_back(&device);
    std::atomic<int> tiles{0};
    std::vector<std::unique_ptr<ScriptedCall>> calls;
    for (int32_t pe = 0; pe < kPes; ++pe) {
      calls.push_back(std::make_unique<ScriptedCall>(config, heaps, pe, 1, problem, [&, pe] {
        ++tiles;
        while (one_hangs && pe == 1 && !heaps.failed()) std::this_thread::yield();
        std::this_thread::sleep_for(kShortDeadline / 8);
      }));
      if (!one_hangs) calls.back()->share(cores);
      calls.back()->follow(devices[static_cast<size_t>(pe)], all);
    }
    std::vector<Arena> arenas(kPes);
    const cpu::Clock::time_point begin = cpu::Clock::now();
    on_threads(kPes, [&](int pe) {
      calls[static_cast<size_t>(pe)]->run(0, arenas[static_cast<size_t>(pe)]);
    });
    check(heaps.failed() == one_hangs, "the message is '" + heaps.failure() + "'");
    if (one_hangs) {
      check_contains(heaps.failure(), {"results missing in phase combine", "after 0.3 s"});
    } else {
      check(tiles > 16, "there are too few tiles for anybody to wait for long");
      check(cpu::Clock::now() - begin > 2 * kShortDeadline, "nobody can have waited for long");
    }
  }
}

// One of a PE's workers hangs; the other needs its tile.
void worker_hangs(uint64_t seed) {
  Problem problem(layer_of(1), Routing::kAllToOne, seed);
  problem.deadline = kShortDeadline;
  const cpu::CallConfig config = problem.config(false);
  HeapGroup heaps(config.shape, config.traffic);
  heaps.next_epoch();
  std::atomic<bool> hung{false};
  ScriptedCall call(config, heaps, 0, 2, problem, [&] {
    if (hung.exchange(true)) return;
    while (!heaps.failed()) std::this_thread::yield();
  });
  Arena arena;
  on_threads(2, [&](int worker) { call.run(worker, arena); });
  check_contains(heaps.failure(), {"PE 0: tiles missing in phase expert for expert ",
                                   "awaited from PE 0 itself: expected 1, seen 0", "after 0.3 s"});
}

// An exception in a PE's task ends the waits of all PEs at once, with its message.
void task_throws(uint64_t seed) {
  constexpr int32_t kPes = 3;
  const Problem problem(layer_of(kPes), Routing::kDistinct, seed);
  const cpu::CallConfig config = problem.config(false);
  for (int32_t workers : {1, 3}) {
    HeapGroup heaps(config.shape, config.traffic);
    heaps.next_epoch();
    std::vector<std::unique_ptr<ScriptedCall>> calls;
    for (int32_t pe = 0; pe < kPes; ++pe) {
      calls.push_back(std::make_unique<ScriptedCall>(config, heaps, pe, workers, problem, [pe] {
        if (pe == 1) throw std::runtime_error("a planted fault");
      }));
    }
    std::vector<Arena> arenas(kPes);
    std::atomic<int> last{0};
    on_threads(kPes * workers, [&](int thread) {
      const size_t pe = static_cast<size_t>(thread / workers);
      last += calls[pe]->run(thread % workers, arenas[pe]);
    });
    check(heaps.failed() && heaps.failure() == "a planted fault",
          "the message is '" + heaps.failure() + "'");
    check(last == kPes, "every PE must have one worker that leaves last");
  }
}

// Two PEs meet in one epoch from different places of the program.
void another_call_site(uint64_t seed) {
  constexpr int32_t kPes = 3;
  const Problem problem(layer_of(kPes), Routing::kDistinct, seed);
  const cpu::CallConfig config = problem.config(false);
  cpu::CallConfig other = config;
  other.tag = 8;
  HeapGroup heaps(config.shape, config.traffic);
  heaps.next_epoch();
  on_threads(kPes, [&](int pe) {
    Arena arena;
    make_call(pe == 2 ? other : config, heaps, pe, 1, problem)->run(0, arena);
    check(heaps.failed(), "PE " + std::to_string(pe) + " did not notice");
  });
  // Who notices first is a matter of chance.
  const bool noticed_by_2 = heaps.failure().starts_with("PE 2: ");
  check_contains(heaps.failure(),
                 {noticed_by_2 ? "another call by PE " : "another call by PE 2", "in phase plan",
                  noticed_by_2 ? "expected epoch 1 of call site 8, seen epoch 1 of call site 1"
                               : "expected epoch 1 of call site 1, seen epoch 1 of call site 8"});
}

}  // namespace

std::vector<Case> exchange_cases() {
  std::vector<Case> cases{{"epoch: what a peer's count signal means", counted_words}};
  for (bool backward : {false, true}) {
    for (int32_t workers : {1, 2}) {
      cases.push_back({std::string("exchange: thousands of epochs, ") +
                           (backward ? "backward, " : "forward, ") + std::to_string(workers) +
                           " workers for each PE",
                       [=](uint64_t seed) { many_epochs(backward, workers, seed); }});
    }
  }
  const std::vector<Case> more{
      {"exchange: a PE dies before it publishes", dies_before_publish},
      {"exchange: a PE dies before it dispatches", dies_before_dispatch},
      {"exchange: a PE dies before its experts", dies_before_experts},
      {"exchange: slow is not dead", slow_is_not_dead},
      {"exchange: a worker hangs", worker_hangs},
      {"exchange: a task throws", task_throws},
      {"exchange: another call site", another_call_site},
  };
  cases.insert(cases.end(), more.begin(), more.end());
  return cases;
}

}  // namespace flashmoe::testing
