// Calls that go wrong, through Engine::enter.
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/cpu/engine.h"
#include "tests/native/harness.h"
#include "tests/native/problem.h"
#include "tests/native/reference.h"
#include "tests/native/runner.h"

namespace flashmoe::testing {
namespace {

using cpu::CallSite;
using cpu::Clock;
using cpu::Engine;

constexpr std::chrono::milliseconds kShortDeadline{200};
// Longer than any wait that ends as it should, also on a busy machine.
constexpr std::chrono::seconds kPatience{20};

Layer layer_of(int32_t num_pes) {
  return {
      .shape = {.num_pes = num_pes,
                .tokens = 9,
                .hidden = 6,
                .intermediate = 7,
                .num_experts = 2 * num_pes,
                .experts_per_token = 2,
                .capacity = core::kNoCapacity,
                .max_rows = 9 * 2 * num_pes,
                .block_rows = 4,
                .block_tokens = 4,
                .block_columns = 4},
      .dtype = cpu::DType::kBFloat16,
      .activation = cpu::Activation::kSilu,
      .gated = true,
      .biased = false,
      .save_rows = true,
      .save_preactivations = true,
  };
}

Problem problem_of(int32_t num_pes, uint64_t seed) {
  return Problem(layer_of(num_pes), Routing::kDistinct, seed);
}

// The site and the devices of a call that failed must still be good for the next run.
void check_next_run(Engine& engine, CallSite& site, uint64_t seed, int64_t run,
                    int32_t num_pes = 4) {
  Problem problem = problem_of(num_pes, seed);
  run_call(engine, site, problem, false, {.run = run});
  check_forward(problem, expect(problem));
}

void check_errors(const Endings& endings, const std::vector<std::string>& parts) {
  for (const std::optional<std::string>& error : endings.await()) {
    check(error.has_value(), "a PE ended well in a call that must fail");
    check_contains(*error, parts);
  }
}

void never_enters(uint64_t seed) {
  Engine engine(1);
  CallSite site;
  Problem problem = problem_of(4, seed);
  problem.deadline = kShortDeadline;
  const std::vector<std::string> message{"PEs 0 1 3: awaited PEs 2 did not enter the call",
                                         "phase enter", "expected 4 PEs, seen 3",
                                         "when the deadline passed"};
  const Clock::time_point begin = Clock::now();
  const Endings punctual(3);
  int part = 0;
  for (int32_t rank : {0, 1, 3}) {
    engine.enter(site, entry(problem, false, rank, {.run = 1}, punctual.done(part++)));
  }
  check_errors(punctual, message);
  check(Clock::now() - begin >= kShortDeadline, "the call was given up before the deadline");
  check(Clock::now() - begin < kPatience, "the call was given up long after the deadline");

  const Endings late(1);
  engine.enter(site, entry(problem, false, 2, {.run = 1}, late.done(0)));
  check_errors(late, message);
  check_next_run(engine, site, seed, 2);
}

// Expert groups that have not failed would otherwise go on to a collective and wait there for those
// that have.
void failed_run_is_refused(uint64_t seed) {
  Engine engine(1);
  CallSite site, another;
  Problem impatient = problem_of(2, seed);
  impatient.deadline = kShortDeadline;
  const Problem patient = problem_of(2, seed);
  const Endings endings(4);
  // PE 1 of either group is missing; the deadline of one is far away.
  engine.enter(
      site, entry(patient, false, 0, {.run = 1, .first_device = 2, .group = 1}, endings.done(0)));
  engine.enter(site, entry(impatient, false, 0, {.run = 1}, endings.done(1)));
  const Clock::time_point begin = Clock::now();
  while (Clock::now() < begin + 2 * kShortDeadline) std::this_thread::yield();
  engine.enter(another, entry(patient, false, 0, {.run = 1}, endings.done(2)));
  engine.enter(another, entry(patient, false, 1, {.run = 1}, endings.done(3)));
  check_errors(endings, {"awaited PEs 1 did not enter the call", "phase enter"});
  check(Clock::now() - begin < kPatience, "a group waited on in a run that had failed");
  check_next_run(engine, site, seed, 2, 2);
  check_next_run(engine, another, seed, 2, 2);
}

// XLA may keep the thread that completes a future. The deadlines of other calls pass all the same.
void refused_callers_that_block(uint64_t seed) {
  constexpr int kCalls = 4;
  Problem problem = problem_of(2, seed);
  problem.deadline = kShortDeadline;
  std::mutex mutex;
  std::condition_variable changed;
  int blocked = 0;
  const auto block_until_all_do = [&] {
    std::unique_lock lock(mutex);
    ++blocked;
    changed.notify_all();
    changed.wait(lock, [&] { return blocked == kCalls; });
  };
  Engine engine(1);
  CallSite site;
  const Endings endings(kCalls);
  for (int i = 0; i < kCalls; ++i) {
    engine.enter(site, entry(problem, false, 0, {.run = i}, endings.done(i, block_until_all_do)));
  }
  check_errors(endings, {"awaited PEs 1 did not enter the call"});
}

void other_sizes(uint64_t seed) {
  Engine engine(1);
  CallSite site;
  const Problem problem = problem_of(4, seed);
  Layer larger = layer_of(4);
  ++larger.shape.max_rows;
  const Problem other(larger, Routing::kDistinct, seed);
  const Problem of_more_pes = problem_of(8, seed);
  int64_t run = 0;
  for (const Problem* odd : {&other, &of_more_pes}) {
    const int32_t last = odd->layer.shape.num_pes - 1;
    ++run;
    const Endings endings(4);
    for (int32_t rank : {0, 1}) {
      engine.enter(site, entry(problem, false, rank, {.run = run}, endings.done(rank)));
    }
    engine.enter(site, entry(*odd, false, last, {.run = run}, endings.done(2)));
    engine.enter(site, entry(problem, false, 2, {.run = run}, endings.done(3)));
    check_errors(endings, {"PE " + std::to_string(last) + " entered the call with other sizes"});
  }
  check_next_run(engine, site, seed, ++run);
}

void rank_out_of_range(uint64_t seed) {
  Engine engine(1);
  CallSite site;
  const Problem problem = problem_of(2, seed);
  for (int32_t rank : {-1, 2, std::numeric_limits<int32_t>::max()}) {
    const Endings endings(1);
    cpu::Entry odd = entry(problem, false, 0, {.run = rank}, endings.done(0));
    odd.rank = rank;
    engine.enter(site, std::move(odd));
    check_errors(endings, {"rank " + std::to_string(rank) + " is out of range"});
  }
  check_next_run(engine, site, seed, 10, 2);
}

// All PEs of a call fail with a message; the next one is right.
void check_refused(Engine& engine, const Problem& problem, bool backward, int64_t run,
                   const std::vector<std::string>& message, uint64_t seed) {
  CallSite site;
  const Endings endings(4);
  const Clock::time_point begin = Clock::now();
  for (int32_t rank = 0; rank < 4; ++rank) {
    engine.enter(site, entry(problem, backward, rank, {.run = run}, endings.done(rank)));
  }
  check_errors(endings, message);
  check(Clock::now() - begin < kPatience, "an error was told late");
  check_next_run(engine, site, seed, run + 1000);
}

void bad_indices(uint64_t seed) {
  int64_t run = 0;
  for (int32_t cores : {1, 12}) {
    Engine engine(cores);
    for (int32_t index :
         {8, -2, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()}) {
      for (bool backward : {false, true}) {
        Problem problem = problem_of(4, seed);
        problem.pes[2].indices[7] = index;
        check_refused(engine, problem, backward, ++run,
                      {"expert index " + std::to_string(index), "PE 2, token 3, slot 1",
                       "out of range: allowed are 0 to 7, and -1 for a masked slot"},
                      seed);
      }
    }
  }
}

void bad_weights(uint64_t seed) {
  Engine engine(1);
  int64_t run = 0;
  const double infinity = std::numeric_limits<double>::infinity();
  for (double weight : {std::nan(""), infinity, -infinity}) {
    Problem problem = problem_of(4, seed);
    problem.pes[1].indices[4] = 3;
    problem.pes[1].weights.set(4, weight);
    check_refused(engine, problem, false, ++run,
                  {"expert weight ", "PE 1, token 2, slot 0", "is not finite"}, seed);

    // Unless asked to look at the weights, the engine computes with them: the token gets no finite
    // result, the others get theirs.
    const std::vector<Expected> expected = expect(problem_of(4, seed));
    problem.check_weights = false;
    CallSite site;
    run_call(engine, site, problem, false, {.run = ++run});
    const Pe& pe = problem.pes[1];
    for (int64_t i = 0; i < pe.y.size(); ++i) {
      const Bounded want = expected[1].y[static_cast<size_t>(i)];
      const double got = pe.y.get(i);
      if (i / problem.layer.shape.hidden == 2) {
        check(!std::isfinite(got), "a number came out of a weight that is none");
      } else {
        check(std::abs(got - want.value) <= want.error, "another token got a wrong result");
      }
    }
  }
}

void heaps_too_large(uint64_t seed) {
  Engine engine(1);
  CallSite site;
  Problem problem = problem_of(4, seed);
  problem.layer.shape.max_rows = int64_t{1} << 50;
  const Endings endings(4);
  for (int32_t rank = 0; rank < 4; ++rank) {
    engine.enter(site, entry(problem, false, rank, {.run = 1}, endings.done(rank)));
  }
  check_errors(endings, {"the call could not be started"});
  check_next_run(engine, site, seed, 2);
}

// Runs that fail, each in its own way, beside runs that do not. Every part of every call ends
// exactly once; nothing of a failure reaches another run.
void failures_beside_successes(int32_t cores, int64_t large_call, uint64_t seed) {
  constexpr int32_t kPes = 4;
  constexpr int kRuns = 12, kSites = 6;
  enum Fault { kNone, kBadIndex, kMissingPe, kFaults };
  Engine engine(cores, large_call);
  std::vector<std::unique_ptr<CallSite>> sites;
  for (int i = 0; i < kSites; ++i) sites.push_back(std::make_unique<CallSite>());
  Random random(seed);
  std::vector<Problem> problems;  // [runs, sites]
  std::vector<int> faulty_site, faulty_pe;
  for (int run = 0; run < kRuns; ++run) {
    faulty_site.push_back(static_cast<int>(random.between(0, kSites - 1)));
    faulty_pe.push_back(static_cast<int>(random.between(0, kPes - 1)));
    for (int site = 0; site < kSites; ++site) {
      Problem& problem =
          problems.emplace_back(problem_of(kPes, seed + static_cast<uint64_t>(site)));
      if (run % kFaults == kMissingPe) problem.deadline = kShortDeadline;
      if (run % kFaults == kBadIndex && site == faulty_site.back()) {
        problem.pes[static_cast<size_t>(faulty_pe.back())].indices[0] = 1000;
      }
    }
  }
  std::vector<Endings> endings;
  for (int run = 0; run < kRuns; ++run) endings.emplace_back(kSites * kPes);
  on_threads(kRuns * kPes, [&](int thread) {
    const int run = thread / kPes, rank = thread % kPes;
    std::vector<int> order;
    for (int site = 0; site < kSites; ++site) order.push_back(site);
    Random own(seed + static_cast<uint64_t>(thread));
    own.shuffle(order);
    for (int site : order) {
      const cpu::Done done = endings[static_cast<size_t>(run)].done(site * kPes + rank);
      if (run % kFaults == kMissingPe && site == faulty_site[static_cast<size_t>(run)] &&
          rank == faulty_pe[static_cast<size_t>(run)]) {
        done("stays away");
        continue;
      }
      engine.enter(*sites[static_cast<size_t>(site)],
                   entry(problems[static_cast<size_t>(run * kSites + site)], false, rank,
                         {.run = run}, done));
    }
  });
  const std::vector<std::string> messages{"", "expert index 1000 (PE ", "deadline"};
  for (int run = 0; run < kRuns; ++run) {
    const int fault = run % kFaults;
    const std::vector<std::optional<std::string>> errors =
        endings[static_cast<size_t>(run)].await();
    for (int part = 0; part < kSites * kPes; ++part) {
      const std::optional<std::string>& error = errors[static_cast<size_t>(part)];
      check(!error || fault != kNone, "a run without a fault failed: " + error.value_or(""));
      if (part / kPes == faulty_site[static_cast<size_t>(run)] && fault != kNone) {
        check(error.has_value(), "a PE ended well in a call that must fail");
      }
      if (error && *error != "stays away")
        check_contains(*error, {messages[static_cast<size_t>(fault)]});
    }
  }
  for (int site = 0; site < kSites; ++site) {
    const std::vector<Expected> expected = expect(problems[static_cast<size_t>(site)]);
    for (int run = kNone; run < kRuns; run += kFaults) {
      check_forward(problems[static_cast<size_t>(run * kSites + site)], expected);
    }
    check_next_run(engine, *sites[static_cast<size_t>(site)], seed, kRuns + site);
  }
}

}  // namespace

std::vector<Case> fault_cases() {
  return {
      {"fault: a PE never enters, or late", never_enters},
      {"fault: what is left of a failed run is refused", failed_run_is_refused},
      {"fault: refused callers that block", refused_callers_that_block},
      {"fault: other sizes", other_sizes},
      {"fault: a rank out of range", rank_out_of_range},
      {"fault: bad expert indices", bad_indices},
      {"fault: weights that are not finite", bad_weights},
      {"fault: heaps that do not fit", heaps_too_large},
      {"fault: failures beside successes, one worker for each PE",
       [](uint64_t seed) { failures_beside_successes(1, kNoneLarge, seed); }},
      {"fault: failures beside successes, several workers for each PE",
       [](uint64_t seed) { failures_beside_successes(12, kNoneLarge, seed); }},
      {"fault: failures beside successes, all PEs on two cores",
       [](uint64_t seed) { failures_beside_successes(2, kAllLarge, seed); }},
  };
}

}  // namespace flashmoe::testing
