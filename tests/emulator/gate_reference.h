// Random problems for the gate, what it must answer, in double precision, and wrong answers that
// the comparison must tell from right ones.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/core/types.h"

namespace flashmoe::testing {

struct GateSizes {
  int tokens;
  int hidden;
  int experts;
  int experts_per_token;
  int groups = 1;
  int groups_per_token = 1;
  bool softmax = true;
  bool renormalize = true;
  bool bias = false;
  bool mask = false;
  float scaling_factor = 1.0f;
};

// Ways to be wrong.
enum class GateFault {
  kNone,
  kRoundedRouter,
  kTiesToHighest,
  kBiasIgnored,
  kBiasedWeights,
  kGroupsIgnored,
  kGroupsByBestOne,
  kNotRenormalized,
  kNotScaled,
  kMaskIgnored,
};

struct GateAnswer {
  std::vector<float> logits;
  std::vector<int32_t> indices;
  std::vector<float> weights;

  explicit GateAnswer(const GateSizes& sizes)
      : logits(size_t(sizes.tokens) * sizes.experts),
        indices(size_t(sizes.tokens) * sizes.experts_per_token, -7),
        weights(size_t(sizes.tokens) * sizes.experts_per_token) {}
  bool operator==(const GateAnswer&) const = default;
};

// Exact: the values of a problem's x are representable in all element types.
template <typename Element>
Element element_of(float value) {
  if constexpr (std::is_same_v<Element, float>) {
    return value;
  } else if constexpr (std::is_same_v<Element, core::BFloat16>) {
    uint32_t bits;
    static_assert(sizeof bits == sizeof value);
    std::copy_n(reinterpret_cast<const char*>(&value), sizeof bits, reinterpret_cast<char*>(&bits));
    return {static_cast<uint16_t>(bits >> 16)};
  } else {
    if (value == 0.0f) return {0};
    if (std::isnan(value)) return {0x7e00};
    int exponent;
    const float fraction = std::frexp(std::fabs(value), &exponent);  // [0.5, 1)
    return {static_cast<uint16_t>((value < 0 ? 0x8000 : 0) + ((exponent + 14) << 10) +
                                  static_cast<int>(fraction * 2048.0f) - 1024)};
  }
}

struct GateProblem {
  GateSizes sizes;
  std::vector<float> x;
  std::vector<float> router;
  std::vector<float> bias;
  std::vector<uint8_t> mask;

  // `random` has normal() and chance(). Every fifth token is 0, so that all its logits are equal;
  // some experts are copies of others, and with groups the last group is a copy of the first.
  // With `exact` the tokens have 24 bits, else 8.
  template <typename Random>
  GateProblem(const GateSizes& of, bool exact, Random& random) : sizes(of) {
    const size_t experts = sizes.experts;
    x.resize(size_t(sizes.tokens) * sizes.hidden);
    for (size_t i = 0; i < x.size(); ++i) {
      const float value = static_cast<float>(random.normal());
      int exponent;
      const float fraction = std::frexp(value, &exponent);
      x[i] = exact ? value : std::ldexp(std::trunc(fraction * 256.0f) / 256.0f, exponent);
      if (!exact && std::fabs(x[i]) < 0x1p-12f) x[i] = 0.0f;
      if (i / sizes.hidden % 5 == 4) x[i] = 0.0f;
    }
    router.resize(sizes.hidden * experts);
    const double scale = 1.0 / std::sqrt(static_cast<double>(sizes.hidden));
    for (float& value : router) value = static_cast<float>(random.normal() * scale);
    bias.resize(sizes.bias ? experts : 0);
    for (float& value : bias) value = static_cast<float>(random.normal() * 0.1);
    const auto copy_expert = [&](size_t from, size_t to) {
      for (int d = 0; d < sizes.hidden; ++d) router[d * experts + to] = router[d * experts + from];
      if (!bias.empty()) bias[to] = bias[from];
    };
    for (size_t e = 1; e < experts; e += 3) copy_expert(e - 1, e);
    const size_t group = experts / sizes.groups;
    for (size_t e = 0; e < group && sizes.groups > 1; ++e) copy_expert(e, experts - group + e);
    mask.resize(sizes.mask ? sizes.tokens : 0);
    for (uint8_t& value : mask) value = random.chance(0.7);
  }

  template <typename Element>
  std::vector<Element> elements() const {
    std::vector<Element> y(x.size());
    std::transform(x.begin(), x.end(), y.begin(), element_of<Element>);
    return y;
  }

  // In double; `magnitudes` become the sums of the products' magnitudes.
  std::vector<double> logits(std::vector<double>& magnitudes,
                             GateFault fault = GateFault::kNone) const {
    const size_t experts = sizes.experts;
    std::vector<double> sums(sizes.tokens * experts);
    magnitudes.assign(sums.size(), 0.0);
    for (int t = 0; t < sizes.tokens; ++t) {
      for (int d = 0; d < sizes.hidden; ++d) {
        const double value = x[size_t(t) * sizes.hidden + d];
        if (value == 0.0) continue;
        for (size_t e = 0; e < experts; ++e) {
          double weight = router[d * experts + e];
          if (fault == GateFault::kRoundedRouter) {
            int exponent;
            weight = std::frexp(weight, &exponent);
            weight = std::ldexp(std::round(weight * 2048.0) / 2048.0, exponent);
          }
          sums[t * experts + e] += value * weight;
          magnitudes[t * experts + e] += std::fabs(value * weight);
        }
      }
    }
    return sums;
  }
};

// The choice for one token of given logits. `ambiguous`: float rounding could make another choice.
struct GateChoice {
  std::vector<int> experts;
  std::vector<double> weights;
  bool ambiguous = false;

  GateChoice(const GateProblem& problem, const float* logits, GateFault fault) {
    const GateSizes& sizes = problem.sizes;
    const int count = sizes.experts;
    const float maximum = *std::max_element(logits, logits + count);
    std::vector<double> scores(count);
    for (int e = 0; e < count; ++e) {
      scores[e] = sizes.softmax ? std::exp(static_cast<double>(logits[e] - maximum))
                                : 1.0 / (1.0 + std::exp(-static_cast<double>(logits[e])));
    }
    if (sizes.softmax) {
      const double sum = std::accumulate(scores.begin(), scores.end(), 0.0);
      for (double& score : scores) score /= sum;
    }
    std::vector<double> biased = scores;
    std::vector<double> noise = scores;  // the size of what is rounded
    if (!problem.bias.empty() && fault != GateFault::kBiasIgnored) {
      for (int e = 0; e < count; ++e) {
        biased[e] += problem.bias[e];
        noise[e] += std::fabs(problem.bias[e]);
      }
    }
    std::vector<double> values = biased;
    if (sizes.groups_per_token < sizes.groups && fault != GateFault::kGroupsIgnored) {
      const int size = count / sizes.groups;
      std::vector<double> worth(sizes.groups), group_noise(sizes.groups);
      for (int g = 0; g < sizes.groups; ++g) {
        std::vector<double> members(biased.begin() + g * size, biased.begin() + (g + 1) * size);
        std::sort(members.rbegin(), members.rend());
        const bool two = size > 1 && fault != GateFault::kGroupsByBestOne;
        worth[g] = two ? members[0] + members[1] : members[0];
        group_noise[g] =
            2.0 * *std::max_element(noise.begin() + g * size, noise.begin() + (g + 1) * size);
      }
      const std::vector<int> best = ranked(worth, group_noise, sizes.groups_per_token, fault);
      std::fill(values.begin(), values.end(), -std::numeric_limits<double>::infinity());
      for (const int g : best) {
        std::copy_n(biased.begin() + g * size, size, values.begin() + g * size);
      }
    }
    experts = ranked(values, noise, sizes.experts_per_token, fault);
    for (const int e : experts) {
      weights.push_back(fault == GateFault::kBiasedWeights ? biased[e] : scores[e]);
    }
    const double sum = std::accumulate(weights.begin(), weights.end(), 1e-20);
    for (double& weight : weights) {
      if (sizes.renormalize && fault != GateFault::kNotRenormalized) weight /= sum;
      if (fault != GateFault::kNotScaled) weight *= sizes.scaling_factor;
    }
  }

 private:
  std::vector<int> ranked(const std::vector<double>& values, const std::vector<double>& noise,
                          int count, GateFault fault) {
    std::vector<int> order(values.size());
    std::iota(order.begin(), order.end(), 0);
    if (fault == GateFault::kTiesToHighest) std::reverse(order.begin(), order.end());
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return values[a] > values[b]; });
    for (int i = 0; i < count && i + 1 < static_cast<int>(order.size()); ++i) {
      const double gap = values[order[i]] - values[order[i + 1]];
      ambiguous |= gap > 0.0 && gap < 0x1p-20 * (noise[order[i]] + noise[order[i + 1]]);
    }
    order.resize(count);
    return order;
  }
};

// An answer to the problem that is right, or wrong in that way.
inline GateAnswer gate_answer(const GateProblem& problem, GateFault fault) {
  const GateSizes& sizes = problem.sizes;
  GateAnswer answer(sizes);
  std::vector<double> magnitudes;
  const std::vector<double> logits = problem.logits(magnitudes, fault);
  std::copy(logits.begin(), logits.end(), answer.logits.begin());
  for (int t = 0; t < sizes.tokens; ++t) {
    const GateChoice choice(problem, &answer.logits[size_t(t) * sizes.experts], fault);
    const bool masked =
        !problem.mask.empty() && problem.mask[t] == 0 && fault != GateFault::kMaskIgnored;
    for (int k = 0; k < sizes.experts_per_token; ++k) {
      const size_t at = size_t(t) * sizes.experts_per_token + k;
      answer.indices[at] = masked ? -1 : choice.experts[k];
      answer.weights[at] = masked ? 0.0f : static_cast<float>(choice.weights[k]);
    }
  }
  return answer;
}

// What is wrong with the answer; empty if nothing. The experts are judged on its own logits.
inline std::string gate_error(const GateProblem& problem, const GateAnswer& answer) {
  const GateSizes& sizes = problem.sizes;
  std::vector<double> magnitudes;
  const std::vector<double> logits = problem.logits(magnitudes);
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!(std::fabs(answer.logits[i] - logits[i]) <= 0x1p-21 * magnitudes[i])) {
      return "logit " + std::to_string(i % sizes.experts) + " of token " +
             std::to_string(i / sizes.experts) + " is " + std::to_string(answer.logits[i]) +
             ", not " + std::to_string(logits[i]);
    }
  }
  int ambiguous = 0;
  for (int t = 0; t < sizes.tokens; ++t) {
    const GateChoice choice(problem, &answer.logits[size_t(t) * sizes.experts], GateFault::kNone);
    const bool masked = !problem.mask.empty() && problem.mask[t] == 0;
    if (!masked && choice.ambiguous) {
      ++ambiguous;
      continue;
    }
    for (int k = 0; k < sizes.experts_per_token; ++k) {
      const size_t at = size_t(t) * sizes.experts_per_token + k;
      const int expert = masked ? -1 : choice.experts[k];
      const double weight = masked ? 0.0 : choice.weights[k];
      const std::string where = "slot " + std::to_string(k) + " of token " + std::to_string(t);
      if (answer.indices[at] != expert) {
        return where + " has expert " + std::to_string(answer.indices[at]) + ", not " +
               std::to_string(expert);
      }
      if (!(std::fabs(answer.weights[at] - weight) <= 0x1p-20 * weight)) {
        return where + " has weight " + std::to_string(answer.weights[at]) + ", not " +
               std::to_string(weight);
      }
    }
  }
  if (ambiguous > 2 + sizes.tokens / 50) {
    return std::to_string(ambiguous) + " tokens have near ties: too many to judge the gate";
  }
  return {};
}

}  // namespace flashmoe::testing
