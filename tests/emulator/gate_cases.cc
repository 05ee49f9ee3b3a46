// The gate on the emulator against double precision: its logits, then its experts and weights on
// its own logits, with ties, biases, groups and masks.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/gate.h"
#include "kernels/emulator/emulator.h"
#include "tests/emulator/cases.h"
#include "tests/emulator/gate_reference.h"
#include "tests/emulator/gate_sizes.h"
#include "tests/emulator/jax_routings.h"
#include "tests/native/harness.h"

namespace flashmoe::testing {
namespace {

using core::BFloat16;
using core::Float16;
using cuda::GateArguments;
using emulator::global_memory;
using emulator::GlobalMemory;

constexpr size_t kSharedBytes = 160 * 1024;

// Memory that holds a problem and what the gate answers.
template <typename Element>
class GateMemory {
 public:
  explicit GateMemory(const GateProblem& problem)
      : sizes_(problem.sizes),
        x_(constant("x", problem.elements<Element>())),
        router_(constant("router", problem.router)),
        bias_(constant("selection_bias", problem.bias)),
        mask_(constant("mask", problem.mask)),
        logits_(sizeof(float) * size_t(sizes_.tokens) * size_t(sizes_.experts), "logits"),
        indices_(sizeof(int32_t) * slots(), "indices"),
        weights_(sizeof(float) * slots(), "weights") {}

  GateArguments arguments() const {
    return {.x = x_.data(),
            .router = router_.template as<float>(),
            .selection_bias = bias_.size() > 0 ? bias_.template as<float>() : nullptr,
            .mask = mask_.size() > 0 ? mask_.template as<uint8_t>() : nullptr,
            .logits = logits_.template as<float>(),
            .indices = indices_.template as<int32_t>(),
            .weights = weights_.template as<float>(),
            .tokens = sizes_.tokens,
            .hidden = sizes_.hidden,
            .num_experts = sizes_.experts,
            .experts_per_token = sizes_.experts_per_token,
            .num_groups = sizes_.groups,
            .groups_per_token = sizes_.groups_per_token,
            .softmax = sizes_.softmax,
            .renormalize = sizes_.renormalize,
            .scaling_factor = sizes_.scaling_factor};
  }

  GateAnswer answer() const {
    GateAnswer result(sizes_);
    std::ranges::copy(logits_.template values<float>(), result.logits.begin());
    std::ranges::copy(indices_.template values<int32_t>(), result.indices.begin());
    std::ranges::copy(weights_.template values<float>(), result.weights.begin());
    return result;
  }

 private:
  template <typename T>
  static GlobalMemory constant(std::string name, const std::vector<T>& values) {
    return global_memory(std::move(name), values, GlobalMemory::Use::kConstant);
  }
  size_t slots() const { return size_t(sizes_.tokens) * size_t(sizes_.experts_per_token); }

  GateSizes sizes_;
  GlobalMemory x_;
  GlobalMemory router_;
  GlobalMemory bias_;
  GlobalMemory mask_;
  GlobalMemory logits_;
  GlobalMemory indices_;
  GlobalMemory weights_;
};

// What the gate answers when `ctas` share the tokens.
template <typename Element, int kThreads>
GateAnswer run_gate(const GateProblem& problem, int ctas, uint64_t seed,
                    size_t shared_bytes = kSharedBytes) {
  const GateMemory<Element> memory(problem);
  const GateArguments arguments = memory.arguments();
  const emulator::Launch launch{
      .blocks = ctas, .threads = kThreads, .shared_bytes = shared_bytes, .seed = seed};
  emulator::launch(launch, [&] {
    const int cta = device::block_index();
    const cuda::TokenRange tokens{arguments.tokens * cta / ctas,
                                  arguments.tokens * (cta + 1) / ctas};
    cuda::gate<Element, kThreads>(arguments, tokens, device::shared_memory(), shared_bytes);
    // Whoever comes next may do as it likes with the shared memory.
    device::shared_memory()[device::thread_index()] = std::byte{0};
    device::block_sync();
    cuda::gate<Element, kThreads>(arguments, tokens, device::shared_memory(), shared_bytes);
  });
  return memory.answer();
}

template <typename Element, int kThreads>
Case right_case(const GateTest<Element, kThreads>& test) {
  return {"gate: " + test.name, [sizes = test.sizes](uint64_t seed) {
            const int ctas = 1 + static_cast<int>(seed % 2);
            Random random(seed);
            const GateProblem problem(sizes, std::is_same_v<Element, float>, random);
            const GateAnswer answer = run_gate<Element, kThreads>(problem, ctas, seed);
            const std::string error = gate_error(problem, answer);
            check(error.empty(), error);
            check(run_gate<Element, kThreads>(problem, ctas + 2, seed + 1) == answer,
                  "other CTAs, other bits");
            check(
                run_gate<Element, kThreads>(problem, ctas, seed, cuda::kGateSharedBytes) == answer,
                "less shared memory, other bits");
          }};
}

// Logits of some experts in each CTA, and the choice in another launch.
void logits_of_some_experts(uint64_t seed) {
  Random random(seed);
  const GateProblem problem({.tokens = 21, .hidden = 40, .experts = 70, .experts_per_token = 3},
                            false, random);
  const GateAnswer whole = run_gate<BFloat16, 384>(problem, 1, seed);
  const GateMemory<BFloat16> memory(problem);
  const GateArguments arguments = memory.arguments();
  const cuda::LogitsArguments products{arguments.x, arguments.router, arguments.logits,
                                       arguments.hidden, arguments.num_experts};
  const emulator::Launch launch{
      .blocks = 2, .threads = 384, .shared_bytes = kSharedBytes, .seed = seed};
  emulator::launch(launch, [&] {
    const int first = device::block_index() * 36;
    cuda::router_logits<BFloat16, 384>(products, 0, arguments.tokens, first, first == 0 ? 36 : 70,
                                       device::shared_memory(), kSharedBytes);
  });
  emulator::launch(launch, [&] {
    const int cta = device::block_index();
    cuda::choose_experts<384>(arguments, cta == 0 ? 0 : 10, cta == 0 ? 10 : arguments.tokens,
                              device::shared_memory());
  });
  check(memory.answer() == whole, "the experts of a logit's block change its bits");
}

void not_a_number(uint64_t seed) {
  Random random(seed);
  GateProblem problem({.tokens = 9,
                       .hidden = 16,
                       .experts = 24,
                       .experts_per_token = 5,
                       .groups = 6,
                       .groups_per_token = 2,
                       .bias = true},
                      false, random);
  for (size_t i = 0; i < problem.x.size(); i += 20) {
    problem.x[i] = std::numeric_limits<float>::quiet_NaN();
  }
  const GateAnswer answer = run_gate<Float16, 384>(problem, 1, seed);
  for (size_t token = 0; token < 9; ++token) {
    std::vector<int32_t> experts(&answer.indices[token * 5], &answer.indices[token * 5 + 5]);
    std::ranges::sort(experts);
    check(experts.front() >= 0 && experts.back() < 24, "an expert that does not exist");
    check(std::ranges::adjacent_find(experts) == experts.end(), "an expert twice");
  }
}

// What JAX answers, on the same logits: those are the rows of the router, picked by the tokens.
template <typename Element, int kThreads>
void as_jax(uint64_t seed) {
  for (const JaxRouting& jax : kJaxRoutings) {
    Random random(seed);
    GateProblem problem({.tokens = kJaxTokens,
                         .hidden = kJaxTokens,
                         .experts = kJaxExperts,
                         .experts_per_token = kJaxK,
                         .groups = jax.groups,
                         .groups_per_token = jax.groups_per_token,
                         .softmax = jax.softmax,
                         .renormalize = jax.renormalize,
                         .bias = !jax.bias.empty(),
                         .scaling_factor = jax.scaling_factor},
                        false, random);
    for (size_t i = 0; i < problem.x.size(); ++i) problem.x[i] = i % (kJaxTokens + 1) == 0;
    const auto scaled = [](int steps) { return static_cast<float>(steps) * kJaxStep; };
    std::ranges::transform(jax.logits, problem.router.begin(), scaled);
    std::ranges::transform(jax.bias, problem.bias.begin(), scaled);
    const GateAnswer answer = run_gate<Element, kThreads>(problem, 2, seed);
    check(answer.logits == problem.router, "other logits than the rows of the router");
    check(answer.indices == jax.indices, "other experts than those that JAX chooses");
    for (size_t i = 0; i < jax.weights.size(); ++i) {
      check(std::fabs(answer.weights[i] - jax.weights[i]) <= 0x1p-20f * jax.weights[i],
            "weight " + std::to_string(i) + " is " + std::to_string(answer.weights[i]) +
                ", and that of JAX " + std::to_string(jax.weights[i]));
    }
  }
}

// The comparison passes what is right and catches every way to be wrong.
void wrong_answers(uint64_t seed) {
  Random random(seed);
  const GateProblem problem({.tokens = 40,
                             .hidden = 32,
                             .experts = 32,
                             .experts_per_token = 4,
                             .groups = 8,
                             .groups_per_token = 3,
                             .softmax = false,
                             .bias = true,
                             .mask = true,
                             .scaling_factor = 2.5f},
                            false, random);
  check(gate_error(problem, gate_answer(problem, GateFault::kNone)).empty(),
        "a right answer is called wrong");
  for (int fault = 1; fault <= static_cast<int>(GateFault::kMaskIgnored); ++fault) {
    check(!gate_error(problem, gate_answer(problem, static_cast<GateFault>(fault))).empty(),
          "fault " + std::to_string(fault) + " is not caught");
  }
}

}  // namespace

std::vector<Case> gate_cases() {
  std::vector<Case> cases;
  for_each_gate_test([&](const auto& test) { cases.push_back(right_case(test)); });
  cases.insert(cases.end(), {
                                {"gate: as JAX, f32", as_jax<float, 512>},
                                {"gate: as JAX, bf16", as_jax<BFloat16, 384>},
                                {"gate: logits of some experts", logits_of_some_experts},
                                {"gate: NaN logits", not_a_number},
                                {"gate: wrong answers are caught", wrong_answers},
                            });
  return cases;
}

}  // namespace flashmoe::testing
