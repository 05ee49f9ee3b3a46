// The command line of the emulator's test programs.
#pragma once

#include <functional>
#include <vector>

#include "tests/emulator/cases.h"

namespace flashmoe::testing {

inline constexpr const char* kUsage =
    "usage: %s [--seed=N] [--schedules=N] [--only=N] [--jobs=N] [part of a case's name ...]\n"
    "\n"
    "  --seed=N       every random choice, and every schedule, follows from it (1)\n"
    "  --schedules=N  of each seeded case (200)\n"
    "  --only=N       the one schedule that a failure named\n"
    "  --jobs=N       processes that share the cases (1)\n";

// Runs the cases whose names contain one of the parts, or all; returns the exit status.
int run_cases(int argc, char** argv,
              const std::function<std::vector<Case>(const Schedules&)>& cases);

}  // namespace flashmoe::testing
