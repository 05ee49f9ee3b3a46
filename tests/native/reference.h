// The layer once more, as a plain loop in double precision, with a bound for the rounding errors of
// every result. The bounds follow from the roundings that the engine is allowed (float arithmetic
// in any order of summation, results and residuals stored in the element type) by the usual
// first-order analysis (Higham, Accuracy and Stability of Numerical Algorithms, chapter 3). Nothing
// is tuned.
#pragma once

#include <cstdint>
#include <vector>

#include "tests/native/problem.h"

namespace flashmoe::testing {

// A number, and how far from it the engine's may be.
struct Bounded {
  double value = 0;
  double error = 0;
};

struct ExpectedExperts {
  std::vector<Bounded> gate, up, down, gate_bias, up_bias, down_bias;
};

// Of one PE; see Pe for the shapes.
struct Expected {
  std::vector<Bounded> y;
  int32_t dropped;
  std::vector<Bounded> dx;
  std::vector<Bounded> d_weights;
  ExpectedExperts d_experts;
};

// What every PE must get.
std::vector<Expected> expect(const Problem& problem);

// Throws CheckFailed if a result is not within its bound.
void check_forward(const Problem& problem, const std::vector<Expected>& expected);
void check_forward_of(int32_t pe, const Problem& problem, const std::vector<Expected>& expected);
void check_backward(const Problem& problem, const std::vector<Expected>& expected);

}  // namespace flashmoe::testing
