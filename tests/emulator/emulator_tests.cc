// Tests of the emulator, and of kernels on it.
//
// usage: emulator_tests [--seed=N] [part of a case's name ...]
//
// Every random choice, and every schedule, follows from the seed.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <string>
#include <vector>

#include "tests/emulator/cases.h"

namespace flashmoe::testing {
namespace {

bool is_wanted(const std::string& name, const std::vector<std::string>& filters) {
  if (filters.empty()) return true;
  for (const std::string& filter : filters) {
    if (name.find(filter) != std::string::npos) return true;
  }
  return false;
}

int run(uint64_t seed, const std::vector<std::string>& filters) {
  std::vector<Case> cases;
  for (auto group : {ordering_cases, warp_cases, async_copy_cases, wgmma_cases, schedule_cases,
                     tensor_core_cases, gate_cases}) {
    std::vector<Case> more = group();
    std::move(more.begin(), more.end(), std::back_inserter(cases));
  }
  int passed = 0, failed = 0;
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  for (const Case& test : cases) {
    if (!is_wanted(test.name, filters)) continue;
    const auto begin = std::chrono::steady_clock::now();
    std::string error;
    try {
      test.run(seed);
    } catch (const std::exception& exception) {
      error = exception.what();
    }
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
    ++(error.empty() ? passed : failed);
    std::printf("%s %6.2f s  %s%s%s\n", error.empty() ? "passed" : "FAILED", time.count(),
                test.name.c_str(), error.empty() ? "" : ": ", error.c_str());
    std::fflush(stdout);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace
}  // namespace flashmoe::testing

int main(int argc, char** argv) {
  uint64_t seed = 1;
  std::vector<std::string> filters;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.starts_with("--seed=")) {
      seed = std::strtoull(argument.c_str() + 7, nullptr, 10);
    } else {
      filters.push_back(argument);
    }
  }
  return flashmoe::testing::run(seed, filters);
}
