// Tests of the whole kernel, on the emulator.
#include <vector>

#include "tests/emulator/cases.h"
#include "tests/emulator/run_cases.h"

int main(int argc, char** argv) {
  using namespace flashmoe::testing;
  return run_cases(argc, argv, [](const Schedules& schedules) {
    std::vector<Case> cases = configuration_cases();
    for (auto& more : {kernel_cases_sm90(schedules), kernel_cases_sm80(schedules)}) {
      cases.insert(cases.end(), more.begin(), more.end());
    }
    return cases;
  });
}
