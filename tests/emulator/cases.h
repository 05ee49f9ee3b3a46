// What the emulator's tests share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "kernels/emulator/emulator.h"
#include "tests/native/harness.h"

namespace flashmoe::testing {

// The cases of each file; main() runs them all.
std::vector<Case> ordering_cases();
std::vector<Case> warp_cases();
std::vector<Case> async_copy_cases();
std::vector<Case> wgmma_cases();
std::vector<Case> schedule_cases();
std::vector<Case> tensor_core_cases();
std::vector<Case> gate_cases();
std::vector<Case> put_cases();
std::vector<Case> configuration_cases();

// Which schedules the seeded cases of a kernel go through.
struct Schedules {
  int count = 200;
  std::optional<uint64_t> only{};  // one of them, by its number
};
std::vector<Case> kernel_cases_sm80(const Schedules& schedules);
std::vector<Case> kernel_cases_sm90(const Schedules& schedules);

// Cases that call run(number) for all schedules, some in each, so that they can be shared out.
inline void add_seeded(std::vector<Case>& cases, const std::string& name,
                       const Schedules& schedules, void (*run)(uint64_t)) {
  const auto attempt = [run](uint64_t number) {
    try {
      run(number);
    } catch (const std::exception& exception) {
      throw CheckFailed(std::string(exception.what()) + " (schedule " + std::to_string(number) +
                        "; --only=" + std::to_string(number) + " repeats it)");
    }
  };
  if (schedules.only) {
    const uint64_t number = *schedules.only;
    cases.push_back({name, [=](uint64_t) { attempt(number); }});
    return;
  }
  constexpr int kOfACase = 50;
  for (int first = 0; first < schedules.count; first += kOfACase) {
    const int end = std::min(first + kOfACase, schedules.count);
    cases.push_back({name + ", " + std::to_string(first) + " to " + std::to_string(end - 1),
                     [=](uint64_t seed) {
                       for (int i = first; i < end; ++i) {
                         attempt(seed * 1'000'000 + static_cast<uint64_t>(i));
                       }
                     }});
  }
}

using Kernel = std::function<void()>;

// What the launch complained of; empty if it passed.
inline std::string complaint(const emulator::Launch& launch, const Kernel& kernel) {
  try {
    emulator::launch(launch, kernel);
  } catch (const emulator::Failure& failure) {
    return failure.what();
  }
  return "";
}

struct Trial {
  emulator::Launch launch;
  std::function<void()> prepare = [] {};  // memory, before each launch
  int seeds = 40;
};

// The kernel is right, whatever the schedule.
inline void passes(uint64_t seed, Trial trial, const Kernel& kernel,
                   std::source_location where = std::source_location::current()) {
  for (int i = 0; i < trial.seeds; ++i) {
    trial.launch.seed = seed * 1000 + static_cast<uint64_t>(i);
    trial.prepare();
    const std::string message = complaint(trial.launch, kernel);
    check(message.empty(), "a right kernel failed: " + message, where);
  }
}

// The kernel is wrong, and every schedule shows it.
inline void is_caught(uint64_t seed, Trial trial, const std::vector<std::string>& parts,
                      const Kernel& kernel,
                      std::source_location where = std::source_location::current()) {
  for (int i = 0; i < trial.seeds; ++i) {
    trial.launch.seed = seed * 1000 + static_cast<uint64_t>(i);
    trial.prepare();
    const std::string message = complaint(trial.launch, kernel);
    check(!message.empty(), "a wrong kernel passed with seed " + std::to_string(trial.launch.seed),
          where);
    check_contains(message, parts, where);
    check_contains(message, {"[seed " + std::to_string(trial.launch.seed) + "]"}, where);
  }
}

// The kernel is wrong, and some schedules show it.
inline void is_caught_sometimes(uint64_t seed, Trial trial, const std::vector<std::string>& parts,
                                const Kernel& kernel,
                                std::source_location where = std::source_location::current()) {
  int caught = 0;
  for (int i = 0; i < trial.seeds; ++i) {
    trial.launch.seed = seed * 1000 + static_cast<uint64_t>(i);
    trial.prepare();
    const std::string message = complaint(trial.launch, kernel);
    if (message.empty()) continue;
    ++caught;
    check_contains(message, parts, where);
  }
  check(caught > 0, "a wrong kernel passed with every seed", where);
}

}  // namespace flashmoe::testing
