// Tests of the emulator, and of parts of the kernel on it.
#include <iterator>
#include <utility>
#include <vector>

#include "tests/emulator/cases.h"
#include "tests/emulator/run_cases.h"

int main(int argc, char** argv) {
  using namespace flashmoe::testing;
  return run_cases(argc, argv, [](const Schedules&) {
    std::vector<Case> cases;
    for (auto group : {ordering_cases, warp_cases, async_copy_cases, wgmma_cases, schedule_cases,
                       tensor_core_cases, gate_cases, put_cases}) {
      std::vector<Case> more = group();
      std::move(more.begin(), more.end(), std::back_inserter(cases));
    }
    return cases;
  });
}
