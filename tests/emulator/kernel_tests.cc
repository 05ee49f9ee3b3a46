// Tests of the whole kernel, on the emulator.
#include <iterator>
#include <utility>
#include <vector>

#include "tests/emulator/cases.h"
#include "tests/emulator/run_cases.h"

int main(int argc, char** argv) {
  using namespace flashmoe::testing;
  return run_cases(argc, argv, [](const Schedules& schedules) {
    std::vector<Case> cases = kernel_cases_sm90(schedules);
    std::vector<Case> more = kernel_cases_sm80(schedules);
    std::move(more.begin(), more.end(), std::back_inserter(cases));
    return cases;
  });
}
