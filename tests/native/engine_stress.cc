// Stress test of the CPU engine without Python and JAX, to be run under the sanitizers.
//
// usage: engine_stress [--seed=N] [part of a case's name ...]
//
// Every random choice follows from the seed. What the threads' timing does to it is left to chance.
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "tests/native/harness.h"

namespace flashmoe::testing {
namespace {

// Ends the process if a case hangs: a deadlock must be a failure that names the case.
class HangGuard {
 public:
  explicit HangGuard(const std::string& name)
      : thread_([this, name] {
          std::unique_lock lock(mutex_);
          if (ended_changed_.wait_for(lock, kLimit, [&] { return ended_; })) return;
          std::printf("FAILED %s: hangs\n", name.c_str());
          std::fflush(stdout);
          std::abort();
        }) {}
  ~HangGuard() {
    {
      const std::lock_guard lock(mutex_);
      ended_ = true;
    }
    ended_changed_.notify_one();
    thread_.join();
  }

 private:
  // Cases take seconds, under a sanitizer and on a busy machine up to a minute.
  static constexpr std::chrono::minutes kLimit{5};

  std::mutex mutex_;
  std::condition_variable ended_changed_;
  bool ended_ = false;
  std::thread thread_;
};

bool is_wanted(const std::string& name, const std::vector<std::string>& filters) {
  if (filters.empty()) return true;
  for (const std::string& filter : filters) {
    if (name.find(filter) != std::string::npos) return true;
  }
  return false;
}

int run(uint64_t seed, const std::vector<std::string>& filters) {
  std::vector<Case> cases;
  for (auto group : {numerics_cases, worker_cases, exchange_cases, engine_cases, fault_cases,
                     product_cases, vector_loop_cases}) {
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
      const HangGuard guard(test.name);
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
