// Calls that go well, through Engine::enter.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cpu/engine.h"
#include "tests/native/harness.h"
#include "tests/native/problem.h"
#include "tests/native/reference.h"
#include "tests/native/runner.h"

namespace flashmoe::testing {
namespace {

using cpu::Activation;
using cpu::CallSite;
using cpu::DType;
using cpu::Engine;

void forward_and_backward(Engine& engine, const Problem& problem) {
  CallSite forward, backward;
  run_call(engine, forward, problem, /*backward=*/false, {});
  run_call(engine, backward, problem, /*backward=*/true, {});
}

void check_all(const Problem& problem, const std::vector<Expected>& expected) {
  check_forward(problem, expected);
  check_backward(problem, expected);
}

// `cores` are shared out among the PEs: one for each, or several; or, where all calls are large,
// fewer than there are workers.
void random_layers(int32_t cores, int64_t large_call, uint64_t seed) {
  Engine engine(cores, large_call);
  Random random(seed + static_cast<uint64_t>(cores));
  for (int i = 0; i < 100; ++i) {
    const Layer layer = random_layer(random);
    const Problem problem(layer, random_routing(random), random.bits());
    forward_and_backward(engine, problem);
    check_all(problem, expect(problem));
  }
}

// A layer in which nothing is degenerate: every expert gets rows, blocks and columns are many.
Layer ordinary_layer() {
  return {
      .shape = {.num_pes = 4,
                .tokens = 29,
                .hidden = 19,
                .intermediate = 22,
                .num_experts = 8,
                .experts_per_token = 3,
                .capacity = core::kNoCapacity,
                .max_rows = 4 * 29 * 3,
                .block_rows = 8,
                .block_tokens = 4,
                .block_columns = 7},
      .dtype = DType::kFloat32,
      .activation = Activation::kSilu,
      .gated = true,
      .biased = true,
      .save_rows = true,
      .save_preactivations = true,
  };
}

void edge_layers(uint64_t seed) {
  Engine engine(1);
  std::vector<Layer> layers;
  const auto add = [&](auto change) { change(layers.emplace_back(ordinary_layer())); };
  add([](Layer& layer) { layer.shape.tokens = 0, layer.shape.max_rows = 0; });
  add([](Layer& layer) { layer.shape.max_rows = 0; });
  add([](Layer& layer) { layer.shape.max_rows = 1; });
  add([](Layer& layer) { layer.shape.capacity = 1; });
  add([](Layer& layer) { layer.shape.hidden = 1, layer.shape.intermediate = 1; });
  add([](Layer& layer) { layer.shape.tokens = 1; });
  add([](Layer& layer) { layer.shape.num_pes = 1; });
  add([](Layer& layer) { layer.shape.num_pes = 8; });
  // Tiles of one element, and those of the custom call (of which the layer needs more than one).
  add([](Layer& layer) {
    layer.shape.block_rows = layer.shape.block_tokens = layer.shape.block_columns = 1;
  });
  add([](Layer& layer) {
    layer.shape.num_pes = 2, layer.shape.num_experts = 2, layer.shape.experts_per_token = 2;
    layer.shape.tokens = 70, layer.shape.hidden = 5, layer.shape.intermediate = 520;
    layer.shape.block_rows = 128, layer.shape.block_tokens = 32, layer.shape.block_columns = 512;
  });
  for (const Layer& layer : layers) {
    for (DType dtype : {DType::kFloat32, DType::kFloat16}) {
      for (Routing routing : {Routing::kDistinct, Routing::kAllToOne, Routing::kAllMasked}) {
        Layer changed = layer;
        changed.dtype = dtype;
        const Problem problem(changed, routing, seed);
        forward_and_backward(engine, problem);
        check_all(problem, expect(problem));
      }
    }
  }
}

bool is_accepted(const Problem& problem, const std::vector<Expected>& expected) {
  try {
    check_all(problem, expected);
    return true;
  } catch (const CheckFailed&) {
    return false;
  }
}

// That the comparison with the reference fails where it must.
void planted_faults(uint64_t seed) {
  Engine engine(1);
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    Layer layer = ordinary_layer();
    layer.dtype = dtype;
    Problem problem(layer, Routing::kDistinct, seed);
    const std::vector<Expected> expected = expect(problem);
    forward_and_backward(engine, problem);
    check_all(problem, expected);

    // A result zeroed, of the wrong sign, or doubled.
    Pe& pe = problem.pes[1];
    for (Tensor* result :
         {&pe.y, &pe.dx, &pe.d_weights, &pe.d_experts.gate, &pe.d_experts.up, &pe.d_experts.down,
          &pe.d_experts.gate_bias, &pe.d_experts.up_bias, &pe.d_experts.down_bias}) {
      std::vector<double> right;
      for (int64_t i = 0; i < result->size(); ++i) right.push_back(result->get(i));
      for (double factor : {0.0, -1.0, 2.0, 1.0}) {
        for (int64_t i = 0; i < result->size(); ++i) {
          result->set(i, factor * right[static_cast<size_t>(i)]);
        }
        check(is_accepted(problem, expected) == (factor == 1.0),
              "a result times " + std::to_string(factor) + " was judged wrongly");
      }
    }

    // The engine is given something else than the reference.
    const auto check_seen = [&](const std::string& fault, auto plant) {
      Problem faulty(layer, Routing::kDistinct, seed);
      plant(faulty);
      forward_and_backward(engine, faulty);
      check(!is_accepted(faulty, expected), "not seen: " + fault);
    };
    check_seen("a missing expert", [](Problem& faulty) {
      Tensor& down = faulty.pes[2].experts.down;
      for (int64_t i = 0; i < down.size() / 2; ++i) down.set(i, 0);
    });
    check_seen("a dropped slot", [](Problem& faulty) {
      std::vector<int32_t>& indices = faulty.pes[0].indices;
      *std::find_if(indices.begin(), indices.end(), [](int32_t e) { return e >= 0; }) = -1;
    });
    check_seen("gate and up swapped", [](Problem& faulty) {
      for (Pe& pe : faulty.pes) std::swap(pe.experts.gate, pe.experts.up);
    });
    check_seen("an unweighted combine", [](Problem& faulty) {
      for (Pe& pe : faulty.pes) {
        for (int64_t i = 0; i < pe.weights.size(); ++i) pe.weights.set(i, 1);
      }
    });
  }
}

void bitwise_repeatable(uint64_t seed) {
  Random random(seed);
  std::vector<Layer> layers{ordinary_layer()};
  for (int i = 0; i < 6; ++i) layers.push_back(random_layer(random));
  for (const Layer& layer : layers) {
    std::vector<std::byte> forward, backward;
    for (int32_t cores : {1, 1, 5, 12, 24}) {
      Engine engine(cores, forward.empty() ? kNoneLarge : kAllLarge);
      for (int repetition = 0; repetition < 3; ++repetition) {
        const Problem problem(layer, Routing::kRepeating, seed);
        forward_and_backward(engine, problem);
        if (forward.empty()) {
          forward = problem.result_bytes(false);
          backward = problem.result_bytes(true);
        }
        const std::string where =
            "with " + std::to_string(cores) + " cores: " + problem.description();
        check(problem.result_bytes(false) == forward, "other bits in forward, " + where);
        check(problem.result_bytes(true) == backward, "other bits in backward, " + where);
      }
    }
  }
}

// One site, many calls on one heap. Routings alternate, so that what an earlier call left behind
// would be seen.
void thousands_of_calls(uint64_t seed) {
  constexpr int kCalls = 3000;
  Layer layer = ordinary_layer();
  layer.shape.num_pes = 3, layer.shape.num_experts = 6, layer.shape.tokens = 5;
  layer.shape.hidden = 6, layer.shape.intermediate = 5, layer.shape.capacity = 4;
  for (bool backward : {false, true}) {
    Engine engine(6);
    CallSite forward_site, site;
    std::vector<Problem> problems;
    std::vector<std::vector<std::byte>> expected;
    for (Routing routing : {Routing::kDistinct, Routing::kAllToOne, Routing::kSomePesMasked}) {
      Problem& problem = problems.emplace_back(layer, routing, seed + problems.size());
      run_call(engine, forward_site, problem, false, {});
      if (backward) run_call(engine, forward_site, problem, true, {});
      expected.push_back(problem.result_bytes(backward));
    }
    for (int i = 0; i < kCalls; ++i) {
      const size_t which = static_cast<size_t>(i) % problems.size();
      Problem& problem = problems[which];
      for (Pe& pe : problem.pes) (backward ? pe.dx : pe.y).clear();
      run_call(engine, site, problem, backward, {.run = i / 100});
      check(problem.result_bytes(backward) == expected[which],
            "call " + std::to_string(i) + " has other results than the first");
    }
  }
}

// Devices that wait for each other outside the engine, as in a collective of XLA.
class Rendezvous {
 public:
  explicit Rendezvous(int devices) : left_(devices) {}
  void meet() {
    std::unique_lock lock(mutex_);
    if (--left_ == 0) changed_.notify_all();
    changed_.wait(lock, [&] { return left_ == 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int left_;
};

// Several executions of a program with independent calls, on a mesh of expert groups (an axis over
// which the data varies) and replicas (one over which it does not). Every device enters the calls
// in an order of its own, from several threads, and goes on to the next iteration of a site on the
// thread on which the last one ended, as XLA does. After every call the devices meet, also on that
// thread.
class Program {
 public:
  Program(Random& random, int runs) : seed_(random.bits()) {
    groups_ = static_cast<int>(random.between(1, 3));
    replicas_ = static_cast<int>(random.between(1, 8 / groups_ > 3 ? 3 : 2));
    pes_ = static_cast<int>(random.between(1, 8 / (groups_ * replicas_)));
    for (int site = 0; site < kSites; ++site) {
      for (int iteration = 0; iteration < kIterations; ++iteration) {
        for (int group = 0; group < groups_; ++group) {
          layers_.push_back(small_layer(random));
          // Backward without a forward call before it keeps nothing.
          routings_.push_back(random_routing(random));
        }
      }
    }
    for (int run = 0; run < runs; ++run) {
      for (int replica = 0; replica < replicas_; ++replica) {
        for (size_t i = 0; i < layers_.size(); ++i) {
          problems_.emplace_back(layers_[i], routings_[i], seed_ + i);
        }
      }
    }
    for (int i = 0; i < runs * kSites * kIterations; ++i) {
      meetings_.push_back(std::make_unique<Rendezvous>(devices()));
    }
    endings_ = std::make_unique<Endings>(runs * kSites * kIterations * devices());
    runs_ = runs;
  }

  void execute(Engine& engine) {
    constexpr int kThreads = 2;  // of each device
    on_threads(devices() * kThreads, [&](int thread) {
      const int device = thread / kThreads;
      Random random(seed_ + static_cast<uint64_t>(thread));
      for (int run = 0; run < runs_; ++run) {
        std::vector<int> order;
        for (int site = thread % kThreads; site < kSites; site += kThreads) order.push_back(site);
        random.shuffle(order);
        for (int site : order) enter(engine, run, site, 0, device);
      }
    });
    endings_->await_success();
  }

  void check_results() const {
    for (size_t i = 0; i < layers_.size(); ++i) {
      const std::vector<Expected> expected = expect(problems_[i]);
      for (size_t copy = i; copy < problems_.size(); copy += layers_.size()) {
        (is_backward(i) ? check_backward : check_forward)(problems_[copy], expected);
      }
    }
  }

 private:
  static constexpr int kSites = 10, kIterations = 2;

  int devices() const { return groups_ * replicas_ * pes_; }
  size_t layer_index(int site, int iteration, int group) const {
    return static_cast<size_t>((site * kIterations + iteration) * groups_ + group);
  }
  bool is_backward(size_t layer) const {
    return layer / static_cast<size_t>(kIterations * groups_) % 2 == 1;
  }

  Layer small_layer(Random& random) const {
    Layer layer = random_layer(random);
    layer.shape.num_pes = pes_;
    layer.shape.num_experts = pes_ * static_cast<int32_t>(random.between(1, 3));
    layer.shape.experts_per_token = std::min(2, layer.shape.num_experts);
    layer.shape.tokens = static_cast<int32_t>(random.between(1, 12));
    layer.shape.hidden = static_cast<int32_t>(random.between(1, 9));
    layer.shape.intermediate = static_cast<int32_t>(random.between(1, 9));
    layer.shape.max_rows = pes_ * layer.shape.slots();
    layer.save_rows = layer.save_preactivations = false;
    return layer;
  }

  void enter(Engine& engine, int run, int site, int iteration, int device) {
    const int rank = device % pes_, group = device / pes_ % groups_;
    const int replica = device / (pes_ * groups_);
    const size_t layer = layer_index(site, iteration, group);
    const Problem& problem =
        problems_[static_cast<size_t>(run * replicas_ + replica) * layers_.size() + layer];
    const int call = (run * kSites + site) * kIterations + iteration;
    const auto go_on = [this, &engine, run, site, iteration, device, call] {
      meetings_[static_cast<size_t>(call)]->meet();
      if (iteration + 1 < kIterations) enter(engine, run, site, iteration + 1, device);
    };
    cpu::Entry e = entry(problem, is_backward(layer), rank, {.run = run, .group = group},
                         endings_->done(call * devices() + device, go_on));
    e.device = device;
    engine.enter(sites_[site], std::move(e));
  }

  const uint64_t seed_;
  int runs_, groups_, replicas_, pes_;
  std::vector<Layer> layers_;  // [sites, iterations, groups]
  std::vector<Routing> routings_;
  std::vector<Problem> problems_;  // [runs, replicas, layers]
  CallSite sites_[kSites];
  std::vector<std::unique_ptr<Rendezvous>> meetings_;  // [runs, sites, iterations]
  std::unique_ptr<Endings> endings_;
};

void independent_calls(int32_t cores, int64_t large_call, uint64_t seed) {
  Random random(seed + static_cast<uint64_t>(cores));
  for (int i = 0; i < 15; ++i) {
    Program program(random, /*runs=*/3);
    Engine engine(cores, large_call);
    program.execute(engine);
    program.check_results();
  }
}

// Replicas of PE 0 all enter before any PE 1 does.
void replicas_in_the_worst_order(uint64_t seed) {
  constexpr int kReplicas = 3;
  Layer layer = ordinary_layer();
  layer.shape.num_pes = 2;
  Engine engine(1);
  CallSite site;
  std::vector<Problem> replicas;
  for (int i = 0; i < kReplicas; ++i) replicas.emplace_back(layer, Routing::kDistinct, seed);
  const Endings endings(2 * kReplicas);
  for (int rank = 0; rank < 2; ++rank) {
    for (int i = 0; i < kReplicas; ++i) {
      engine.enter(site, entry(replicas[static_cast<size_t>(i)], false, rank,
                               {.first_device = 2 * i}, endings.done(2 * i + rank)));
    }
  }
  endings.await_success();
  const std::vector<Expected> expected = expect(replicas[0]);
  for (const Problem& replica : replicas) check_forward(replica, expected);
}

// How many workers computed at the same time, at most.
int most_at_once(const std::vector<core::TraceRecord>& records) {
  std::vector<std::pair<int64_t, int>> changes;  // ends before begins where the times are equal
  for (const core::TraceRecord& record : records) {
    if (record.phase == core::Phase::kEnter) continue;
    changes.emplace_back(record.ready, 1);
    changes.emplace_back(record.end, -1);
  }
  std::sort(changes.begin(), changes.end());
  int now = 0, most = 0;
  for (const auto& [time, change] : changes) most = std::max(most, now += change);
  return most;
}

// Every row of every phase is recorded once, and a buffer that is full counts what it loses.
void traced_call(int32_t cores, int64_t large_call, uint64_t seed) {
  Engine engine(cores, large_call);
  const Problem problem(ordinary_layer(), Routing::kDistinct, seed);
  const core::Shape& shape = problem.layer.shape;
  forward_and_backward(engine, problem);
  check(engine.stop_trace().records.empty(), "recorded although nobody asked for it");

  engine.start_trace(1'000'000);
  forward_and_backward(engine, problem);
  const cpu::TraceBuffer::Contents trace = engine.stop_trace();
  check(trace.lost == 0, "lost records although there was room");
  const auto rows = [&](core::Phase phase, int32_t backward) {
    int64_t sum = 0;
    for (const core::TraceRecord& record : trace.records) {
      if (record.phase == phase && record.backward == backward) sum += record.rows;
    }
    return sum;
  };
  int64_t sent = 0;
  for (const Pe& pe : problem.pes) {
    sent += std::count_if(pe.indices.begin(), pe.indices.end(), [](int32_t e) { return e >= 0; });
  }
  for (const core::TraceRecord& r : trace.records) {
    check(r.begin <= r.ready && r.ready <= r.end, "times of a task out of order");
  }
  for (int32_t backward : {0, 1}) {
    check(rows(core::Phase::kDispatch, backward) == sent, "dispatched rows");
    check(rows(core::Phase::kFirst, backward) == sent * shape.intermediate_tiles(), "first rows");
    check(rows(core::Phase::kSecond, backward) == sent * shape.hidden_tiles(), "second rows");
    check(rows(core::Phase::kWeights, backward) == sent * shape.intermediate_tiles() * backward,
          "rows of weight gradients");
    check(rows(core::Phase::kCombine, backward) == int64_t{shape.num_pes} * shape.tokens,
          "combined tokens");
  }

  if (large_call == kAllLarge) {
    check(most_at_once(trace.records) <= cores, "more workers computed than there are cores");
  }

  engine.start_trace(7);
  forward_and_backward(engine, problem);
  const cpu::TraceBuffer::Contents full = engine.stop_trace();
  check(full.records.size() == 7, "more or fewer records than there was room for");
  check(full.lost == static_cast<int64_t>(trace.records.size()) - 7, "lost records miscounted");
}

}  // namespace

std::vector<Case> engine_cases() {
  return {
      {"engine: random layers, one worker for each PE",
       [](uint64_t seed) { random_layers(1, kNoneLarge, seed); }},
      {"engine: random layers, several workers for each PE",
       [](uint64_t seed) { random_layers(20, kNoneLarge, seed); }},
      {"engine: random layers, all PEs on one core",
       [](uint64_t seed) { random_layers(1, kAllLarge, seed); }},
      {"engine: random layers, all PEs on three cores",
       [](uint64_t seed) { random_layers(3, kAllLarge, seed); }},
      {"engine: edges", edge_layers},
      {"engine: planted faults are seen", planted_faults},
      {"engine: the same bits, whatever the number of workers", bitwise_repeatable},
      {"engine: thousands of calls on one heap", thousands_of_calls},
      {"engine: independent calls in different orders, one worker for each PE",
       [](uint64_t seed) { independent_calls(1, kNoneLarge, seed); }},
      {"engine: independent calls in different orders, several workers for each PE",
       [](uint64_t seed) { independent_calls(16, kNoneLarge, seed); }},
      {"engine: independent calls in different orders, all PEs on two cores",
       [](uint64_t seed) { independent_calls(2, kAllLarge, seed); }},
      {"engine: replicas in the worst order", replicas_in_the_worst_order},
      {"engine: a trace, one worker for each PE",
       [](uint64_t seed) { traced_call(1, kNoneLarge, seed); }},
      {"engine: a trace, several workers for each PE",
       [](uint64_t seed) { traced_call(16, kNoneLarge, seed); }},
      {"engine: a trace, all PEs on one core",
       [](uint64_t seed) { traced_call(1, kAllLarge, seed); }},
      {"engine: a trace, all PEs on three cores",
       [](uint64_t seed) { traced_call(3, kAllLarge, seed); }},
  };
}

}  // namespace flashmoe::testing
