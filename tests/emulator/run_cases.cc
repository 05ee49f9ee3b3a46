#include "tests/emulator/run_cases.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace flashmoe::testing {
namespace {

struct Options {
  uint64_t seed = 1;
  int jobs = 1;
  Schedules schedules;
  std::vector<std::string> filters;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto value = [&](const std::string& name) -> std::optional<uint64_t> {
      if (!argument.starts_with(name + "=")) return std::nullopt;
      return std::stoull(argument.substr(name.size() + 1));
    };
    if (const auto seed = value("--seed")) {
      options.seed = *seed;
    } else if (const auto count = value("--schedules")) {
      options.schedules.count = static_cast<int>(*count);
    } else if (const auto only = value("--only")) {
      options.schedules.only = only;
    } else if (const auto jobs = value("--jobs")) {
      options.jobs = static_cast<int>(*jobs);
    } else if (argument.starts_with("-")) {
      throw std::invalid_argument("unknown option " + argument);
    } else {
      options.filters.push_back(argument);
    }
  }
  return options;
}

bool is_wanted(const std::string& name, const std::vector<std::string>& filters) {
  if (filters.empty()) return true;
  for (const std::string& filter : filters) {
    if (name.find(filter) != std::string::npos) return true;
  }
  return false;
}

// In memory that the processes share. The emulator has one launch per process.
struct Progress {
  std::atomic<size_t> next = 0;  // case
  std::atomic<int> passed = 0, failed = 0;
};

void work(const std::vector<Case>& cases, uint64_t seed, Progress& progress) {
  for (size_t i = progress.next++; i < cases.size(); i = progress.next++) {
    const auto begin = std::chrono::steady_clock::now();
    std::string error;
    try {
      cases[i].run(seed);
    } catch (const std::exception& exception) {
      error = exception.what();
    }
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
    ++(error.empty() ? progress.passed : progress.failed);
    std::printf("%s %6.2f s  [%zu/%zu] %s%s%s\n", error.empty() ? "passed" : "FAILED", time.count(),
                i + 1, cases.size(), cases[i].name.c_str(), error.empty() ? "" : ": ",
                error.c_str());
    std::fflush(stdout);
  }
}

}  // namespace

int run_cases(int argc, char** argv,
              const std::function<std::vector<Case>(const Schedules&)>& cases) {
  Options options;
  try {
    options = parse(argc, argv);
  } catch (const std::exception& exception) {
    std::fprintf(stderr, "%s\n\n", exception.what());
    std::fprintf(stderr, kUsage, argv[0]);
    return 2;
  }
  std::vector<Case> wanted;
  for (Case& test : cases(options.schedules)) {
    if (is_wanted(test.name, options.filters)) wanted.push_back(std::move(test));
  }
  void* shared =
      mmap(nullptr, sizeof(Progress), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) {
    std::perror("mmap");
    return 2;
  }
  Progress& progress = *new (shared) Progress;
  std::printf("seed %llu\n", static_cast<unsigned long long>(options.seed));
  std::fflush(stdout);
  for (int job = 1; job < options.jobs; ++job) {
    const pid_t child = fork();
    if (child < 0) {
      std::perror("fork");
      break;  // fewer processes do it too
    }
    if (child == 0) {
      work(wanted, options.seed, progress);
      std::_Exit(0);
    }
  }
  work(wanted, options.seed, progress);
  for (int status; wait(&status) > 0;) {
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) continue;
    ++progress.failed;
    std::printf("FAILED a process died with status %d\n", status);
  }
  const int passed = progress.passed, failed = progress.failed;
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace flashmoe::testing
