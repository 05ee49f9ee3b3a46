// The cases of the whole kernel: the same for every engine.
//
// What is checked in all of them: results within the rounding errors of a float64 reference, no
// failure, and whatever the emulator sees. A seeded case runs many schedules; everything that it
// chooses follows from one number, which a failure names and --only repeats.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tests/emulator/cases.h"
#include "tests/emulator/emulated_kernel.h"
#include "tests/emulator/kernel_suite.h"
#include "tests/native/reference.h"

namespace flashmoe::testing {

template <typename Engine, typename Transport = cuda::DirectTransport>
class KernelCases {
 public:
  explicit KernelCases(std::string engine) : engine_(std::move(engine)) {}

  // Layers of all kinds, on at most so many PEs, the gate inside, and calls that go wrong.
  std::vector<Case> suite(int32_t most_pes = 8) const {
    std::vector<Case> cases;
    for (SuiteCase& test : kernel_suite(cuda::kDTypeOf<Element>)) {
      if (test.layer.shape.num_pes > most_pes) continue;
      test.layer.factor_error = kFactorError;
      cases.push_back({"kernel " + engine_ + ": " + test.name, [=](uint64_t seed) {
                         run_calls(test.layer, test.routing, seed,
                                   {.ctas = 1 + static_cast<int>(seed % 3)});
                       }});
    }
    if constexpr (Transport::kNetwork) {
      // Nodes of 1, 2 and 4 PEs.
      for (const int32_t node : {1, 2, 4}) {
        cases.push_back(
            {"kernel " + engine_ + ": nodes of " + std::to_string(node), [node](uint64_t seed) {
               run_calls(layer(8, 9, 72, 24, 16, 3, kGated | kBiased), Routing::kDistinct, seed,
                         {.reaches = same_node(node)});
             }});
      }
    } else {
      cases.push_back({"kernel " + engine_ + ": virtual PEs of one GPU", [](uint64_t seed) {
                         run_calls(layer(4, 9, 24, 24, 8, 2, kGated), Routing::kDistinct, seed,
                                   {.ctas = 2, .one_gpu = true});
                       }});
    }
    const auto add_gated = [&](const std::string& name, const GateSizes& sizes) {
      cases.push_back(
          {"kernel " + engine_ + ": " + name, [=](uint64_t seed) { run_gated(sizes, seed); }});
    };
    add_gated("softmax gate", {.tokens = 13, .hidden = 40, .experts = 16, .experts_per_token = 3});
    add_gated("sigmoid gate with bias, groups and mask", {.tokens = 13,
                                                          .hidden = 40,
                                                          .experts = 16,
                                                          .experts_per_token = 2,
                                                          .groups = 4,
                                                          .groups_per_token = 2,
                                                          .softmax = false,
                                                          .bias = true,
                                                          .mask = true,
                                                          .scaling_factor = 2.5f});
    cases.push_back({"kernel " + engine_ + ": a PE never enters, with the gate", absent_pe_gated});
    cases.push_back({"kernel " + engine_ + ": bad index", bad_index});
    cases.push_back({"kernel " + engine_ + ": weight that is not finite", bad_weight});
    return cases;
  }

  // Those that depend on the order of events, and one of the most PEs.
  std::vector<Case> protocol(const Schedules& schedules) const {
    std::vector<Case> cases;
    const auto add = [&](const std::string& name, void (*run)(uint64_t)) {
      add_seeded(cases, "kernel " + engine_ + ", schedules: " + name, schedules, run);
    };
    add("any layer", any_layer);
    add("epochs", epochs);
    add("a PE never enters", absent_pe);
    add("a PE gives up", impatient_pe);
    add("PEs in different calls", other_call);
    if constexpr (Engine::kThreads <= 384) {  // the emulator has no more threads
      static_assert(cuda::kMaxPes == 64);
      cases.push_back({"kernel " + engine_ + ": 64 PEs", [](uint64_t seed) {
                         run_calls(layer(64, 3, 16, 24, 128, 4, kGated), Routing::kDistinct, seed,
                                   {.ctas = 1});
                       }});
    }
    return cases;
  }

 private:
  using Element = typename Engine::Element;
  using Activation = core::Activation;
  static constexpr int kGated = 1, kBiased = 2;
  static constexpr double kFactorError = Engine::kExact ? 0 : 0x1p-11;  // tf32 has 11 bits

  static Layer layer(int32_t pes, int32_t tokens, int32_t hidden, int32_t intermediate,
                     int32_t experts, int32_t k, int parts,
                     Activation activation = Activation::kSilu) {
    Layer of =
        kernel_layer({pes, tokens, hidden, intermediate, experts, k}, cuda::kDTypeOf<Element>,
                     (parts & kGated) != 0, (parts & kBiased) != 0, activation);
    of.factor_error = kFactorError;
    return of;
  }

  static void check_no_failure(const KernelResult& result) {
    for (const std::string& failure : result.failures) check(failure.empty(), failure);
  }

  // Two calls of a layer.
  static void run_calls(const Layer& layer, Routing routing, uint64_t seed,
                        const KernelTrial& trial) {
    std::vector<Problem> problems;
    for (uint64_t epoch = 0; epoch < 2; ++epoch) {
      problems.emplace_back(layer, routing, 2 * seed + epoch);
    }
    check_no_failure(run_kernel_on_emulator<Engine, Transport>(problems, seed, trial));
    for (const Problem& problem : problems) check_forward(problem, expect(problem));
  }

  // The kernel routes by itself.
  static void run_gated(const GateSizes& sizes, uint64_t seed) {
    const Layer of =
        layer(2, sizes.tokens, sizes.hidden, 24, sizes.experts, sizes.experts_per_token, kGated);
    Random random(seed);
    std::vector<Problem> problems;
    KernelTrial trial;
    for (uint64_t epoch = 0; epoch < 2; ++epoch) {
      GatedProblem gated(of, sizes, 2 * seed + epoch, random);
      problems.push_back(std::move(gated.problem));
      trial.gates.push_back(std::move(gated.gates));
    }
    check_no_failure(run_kernel_on_emulator<Engine, Transport>(problems, seed, trial));
    for (const Problem& problem : problems) check_forward(problem, expect(problem));
  }

  using Reach = std::function<bool(int32_t, int32_t)>;

  // PEs store to those of their own node.
  static Reach same_node(int32_t pes_of_node) {
    return [=](int32_t pe, int32_t other) { return pe / pes_of_node == other / pes_of_node; };
  }
  // Nodes; or any PEs, also such as are not reached by those that they reach.
  static Reach random_reach(Random& random) {
    if (random.chance(0.5)) return same_node(random.pick<int32_t>({1, 2, 4}));
    const uint64_t pairs = random.bits();
    return [=](int32_t pe, int32_t other) { return (pairs >> (8 * pe + other) & 1) != 0; };
  }

  // A random layer of few PEs; random routing.
  static void any_layer(uint64_t seed) {
    Random random(seed);
    const int32_t pes = random.pick<int32_t>({1, 2, 2, 4, 8});
    const int32_t experts = pes * random.pick<int32_t>({1, 2, 3});
    const auto width = [&] { return random.pick<int32_t>({8, 16, 24, 72, 136}); };
    Layer of =
        layer(pes, static_cast<int32_t>(random.chance(0.1) ? 70 : random.between(0, 9)), width(),
              width(), experts, static_cast<int32_t>(random.between(1, std::min(experts, 4))),
              (random.chance(0.5) ? kGated : 0) | (random.chance(0.5) ? kBiased : 0));
    if (random.chance(0.2)) of.shape.capacity = random.between(1, 9);
    if (random.chance(0.2)) of.shape.max_rows = random.between(0, of.shape.max_rows);
    KernelTrial trial{.ctas = static_cast<int32_t>(random.between(1, pes > 2 ? 1 : 3))};
    const Routing routing = random_routing(random);
    if constexpr (Transport::kNetwork) {
      trial.reaches = random_reach(random);
    } else {
      trial.one_gpu = random.chance(0.3);
    }
    run_calls(of, routing, seed, trial);
  }

  // Three calls, so that PEs meet that are in different epochs and every signal is used again.
  // Whatever the schedule, the results have the same bits.
  struct Epochs {
    std::vector<Problem> problems;
    std::vector<std::vector<Expected>> expected;
    std::vector<std::byte> bytes;  // of the first schedule

    Epochs() {
      for (uint64_t epoch = 0; epoch < 3; ++epoch) {
        problems.emplace_back(layer(2, 5, 24, 136, 4, 2, kGated | kBiased), Routing::kDistinct,
                              epoch);
        expected.push_back(expect(problems.back()));
      }
    }
  };
  static void epochs(uint64_t seed) {
    if (!epochs_) epochs_ = std::make_unique<Epochs>();
    Epochs& calls = *epochs_;
    for (Problem& problem : calls.problems) problem.clear_results();
    check_no_failure(run_kernel_on_emulator<Engine, Transport>(calls.problems, seed, {.ctas = 2}));
    std::vector<std::byte> bytes;
    for (size_t epoch = 0; epoch < calls.problems.size(); ++epoch) {
      check_forward(calls.problems[epoch], calls.expected[epoch]);
      const std::vector<std::byte> more = calls.problems[epoch].result_bytes(false);
      bytes.insert(bytes.end(), more.begin(), more.end());
    }
    if (calls.bytes.empty()) calls.bytes = bytes;
    check(bytes == calls.bytes, "another schedule, other bits");
  }

  static void check_is_nan(const Tensor& y, const std::string& of) {
    for (int64_t i = 0; i < y.size(); ++i)
      check(std::isnan(y.get(i)), "y of " + of + " is not NaN");
  }

  static constexpr double kShortDeadline = 0.05;
  static constexpr int32_t kPes = 3;  // of the calls that go wrong
  static std::vector<Problem> one_call(uint64_t seed) {
    std::vector<Problem> problems;
    problems.emplace_back(layer(kPes, 5, 16, 24, 6, 2, kGated), Routing::kDistinct, seed);
    return problems;
  }

  // By their deadline, the others say whom they miss, and poison their results.
  static void absent_pe(uint64_t seed) {
    Random random(seed);
    const auto absent = static_cast<int32_t>(random.between(0, kPes - 1));
    std::vector<Problem> problems = one_call(seed);
    const KernelResult result = run_kernel_on_emulator<Engine, Transport>(
        problems, seed,
        {.ctas = 2,
         .deadline = kShortDeadline,
         .edit = [&](cuda::KernelArguments& arguments, size_t, int32_t pe) {
           arguments.pes[0].absent = pe == absent;
         }});
    for (int32_t pe = 0; pe < kPes; ++pe) {
      const std::string& failure = result.failures[static_cast<size_t>(pe)];
      if (pe == absent) {
        check(failure.empty(), "the PE that never entered says: " + failure);
      } else {
        check_contains(failure, {"PE " + std::to_string(pe) + ":",
                                 "no counts from PE " + std::to_string(absent), "deadline"});
        check_is_nan(problems[0].pes[static_cast<size_t>(pe)].y, "PE " + std::to_string(pe));
      }
    }
    check(static_cast<double>(result.nanoseconds) < 2e9 * kShortDeadline,
          "it took " + std::to_string(result.nanoseconds) + " ns to end after the deadline");
  }

  // What the gates of the others have answered by then is poisoned too.
  static void absent_pe_gated(uint64_t seed) {
    const GateSizes sizes{.tokens = 5, .hidden = 16, .experts = 6, .experts_per_token = 2};
    Random random(seed);
    GatedProblem gated(layer(kPes, 5, 16, 24, 6, 2, kGated), sizes, seed, random);
    std::vector<Problem> problems;
    problems.push_back(std::move(gated.problem));
    const KernelResult result = run_kernel_on_emulator<Engine, Transport>(
        problems, seed,
        {.ctas = 2,
         .deadline = kShortDeadline,
         .gates = {std::move(gated.gates)},
         .edit = [](cuda::KernelArguments& arguments, size_t, int32_t pe) {
           arguments.pes[0].absent = pe == 1;
         }});
    for (const size_t pe : {0, 2}) {
      check_contains(result.failures[pe], {"no counts from PE 1"});
      check_is_nan(problems[0].pes[pe].y, "PE " + std::to_string(pe));
      check(problems[0].pes[pe].dropped[0] == 0, "a PE that failed has dropped rows");
    }
  }

  // A PE gives up early, wherever it may be. All end, and a result is right or NaN.
  static void impatient_pe(uint64_t seed) {
    Random random(seed);
    const auto impatient = static_cast<int32_t>(random.between(0, kPes - 1));
    const auto deadline = uint64_t{1} << random.between(0, 17);  // nanoseconds
    std::vector<Problem> problems = one_call(seed);
    const KernelResult result = run_kernel_on_emulator<Engine, Transport>(
        problems, seed,
        {.ctas = 2,
         .deadline = kShortDeadline,
         .edit = [&](cuda::KernelArguments& arguments, size_t, int32_t pe) {
           if (pe == impatient) arguments.deadline = deadline;
         }});
    const std::vector<Expected> expected = expect(problems[0]);
    for (int32_t pe = 0; pe < kPes; ++pe) {
      if (result.failures[static_cast<size_t>(pe)].empty()) {
        check_forward_of(pe, problems[0], expected);
      } else {
        check_is_nan(problems[0].pes[static_cast<size_t>(pe)].y, "PE " + std::to_string(pe));
      }
    }
    check(static_cast<double>(result.nanoseconds) < 4e9 * kShortDeadline,
          "it took " + std::to_string(result.nanoseconds) + " ns to end");
  }

  // One PE executes the call of another place in the program.
  static void other_call(uint64_t seed) {
    std::vector<Problem> problems;
    problems.emplace_back(layer(2, 5, 16, 24, 4, 2, kGated), Routing::kDistinct, seed);
    const KernelResult result = run_kernel_on_emulator<Engine, Transport>(
        problems, seed,
        {.ctas = 2,
         .deadline = kShortDeadline,
         .edit = [](cuda::KernelArguments& arguments, size_t, int32_t pe) {
           arguments.tag = static_cast<uint32_t>(7 + pe);
         }});
    for (size_t pe = 0; pe < 2; ++pe) {
      check_contains(result.failures[pe], {"call site 7", "call site 8"});
      check_is_nan(problems[0].pes[pe].y, "PE " + std::to_string(pe));
    }
  }

  // The PE with the fault names it; the other one misses its counts. Neither heap is used again.
  static void check_fault(std::vector<Problem>& problems, uint64_t seed,
                          const std::vector<std::string>& parts) {
    const KernelResult result = run_kernel_on_emulator<Engine, Transport>(
        problems, seed, {.ctas = 2, .deadline = kShortDeadline});
    check_contains(result.failures[1], parts);
    check_contains(result.failures[0], {"no counts from PE 1"});
    for (const Problem& problem : problems) {
      for (const Pe& pe : problem.pes) check_is_nan(pe.y, "a failed PE");
    }
  }
  static std::vector<Problem> two_calls(uint64_t seed) {
    std::vector<Problem> problems;
    for (uint64_t epoch = 0; epoch < 2; ++epoch) {
      problems.emplace_back(layer(2, 40, 16, 24, 4, 2, kGated), Routing::kDistinct,
                            2 * seed + epoch);
    }
    return problems;
  }
  static void bad_index(uint64_t seed) {
    std::vector<Problem> problems = two_calls(seed);
    problems[0].pes[1].indices[67] = 4;
    check_fault(problems, seed, {"expert index 4", "token 33, slot 1", "0 to 3"});
  }
  static void bad_weight(uint64_t seed) {
    std::vector<Problem> problems = two_calls(seed);
    problems[0].pes[1].indices[4] = 0;
    problems[0].pes[1].weights.set(4, INFINITY);
    check_fault(problems, seed, {"token 2, slot 0", "not finite"});
  }

  inline static std::unique_ptr<Epochs> epochs_;  // of all schedules of this process

  std::string engine_;
};

}  // namespace flashmoe::testing
