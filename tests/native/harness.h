// The native tests' own small harness: named cases, a seed, checks that throw, threads that report.
#pragma once

#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace flashmoe::testing {

struct Case {
  std::string name;
  std::function<void(uint64_t seed)> run;
};

// The cases of each file; main() runs them all.
std::vector<Case> numerics_cases();
std::vector<Case> worker_cases();
std::vector<Case> exchange_cases();
std::vector<Case> engine_cases();
std::vector<Case> fault_cases();
std::vector<Case> product_cases();
std::vector<Case> vector_loop_cases();

class CheckFailed : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws CheckFailed, with the place of the caller, unless `condition` holds.
void check(bool condition, std::string_view message,
           std::source_location where = std::source_location::current());

// Checks that `text` contains every one of `parts`.
void check_contains(std::string_view text, const std::vector<std::string>& parts,
                    std::source_location where = std::source_location::current());

// Runs f(0) ... f(count - 1), each on a thread of its own, and throws the first exception of any.
void on_threads(int count, const std::function<void(int)>& f);

// A number that the compiler cannot predict and that is the same for equal seeds (SplitMix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // A whole number in [low, high].
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
  }
  bool chance(double probability) { return uniform() < probability; }
  // In [0, 1).
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  // Mean 0 and variance 1, in (-6, 6).
  double normal() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
  template <typename T>
  const T& pick(const std::vector<T>& values) {
    return values[static_cast<size_t>(between(0, static_cast<int64_t>(values.size()) - 1))];
  }
  template <typename T>
  void shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i > 1; --i) {
      std::swap(values[i - 1],
                values[static_cast<size_t>(between(0, static_cast<int64_t>(i) - 1))]);
    }
  }

 private:
  uint64_t state_;
};

}  // namespace flashmoe::testing
