// Stress test of the CPU engine without Python and JAX, to be run under the sanitizers.
//
// usage: engine_stress [--seed=N] [--without=PART ...] [part of a case's name ...]
//
// Every random choice follows from the seed. What the threads' timing does to it is left to chance.
#include <algorithm>
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

struct Options {
  uint64_t seed = 1;
  std::vector<std::string> parts;    // of names; none: all cases run
  std::vector<std::string> without;  // parts of the names of those that do not
};

bool is_wanted(const std::string& name, const Options& options) {
  const auto has = [&](const std::string& part) { return name.find(part) != std::string::npos; };
  return (options.parts.empty() || std::ranges::any_of(options.parts, has)) &&
         std::ranges::none_of(options.without, has);
}

int run(const Options& options) {
  std::vector<Case> cases;
  for (auto group : {numerics_cases, worker_cases, exchange_cases, engine_cases, fault_cases,
                     product_cases, vector_loop_cases}) {
    std::vector<Case> more = group();
    std::move(more.begin(), more.end(), std::back_inserter(cases));
  }
  int passed = 0, failed = 0;
  std::printf("seed %llu\n", static_cast<unsigned long long>(options.seed));
  for (const Case& test : cases) {
    if (!is_wanted(test.name, options)) continue;
    const auto begin = std::chrono::steady_clock::now();
    std::string error;
    try {
      const HangGuard guard(test.name);
      test.run(options.seed);
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
  flashmoe::testing::Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto value = [&](const std::string& name) { return argument.substr(name.size()); };
    if (argument.starts_with("--seed=")) {
      options.seed = std::stoull(value("--seed="));
    } else if (argument.starts_with("--without=")) {
      options.without.push_back(value("--without="));
    } else if (argument.starts_with("-")) {
      std::puts("usage: engine_stress [--seed=N] [--without=PART ...] [part of a case's name ...]");
      return argument == "--help" ? 0 : 2;
    } else {
      options.parts.push_back(argument);
    }
  }
  return flashmoe::testing::run(options);
}
