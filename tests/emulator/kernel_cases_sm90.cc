#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/engine_sm90.h"
#include "tests/emulator/cases.h"
#include "tests/emulator/kernel_cases.h"

namespace flashmoe::testing {

std::vector<Case> kernel_cases_sm90(const Schedules& schedules) {
  std::vector<Case> cases;
  const auto add = [&](std::vector<Case> more) {
    std::move(more.begin(), more.end(), std::back_inserter(cases));
  };
  add(KernelCases<cuda::Sm90Engine<core::BFloat16, 128>>("sm90a bf16, 128 rows").suite());
  add(KernelCases<cuda::Sm90Engine<core::BFloat16, 64>>("sm90a bf16, 64 rows").suite());
  add(KernelCases<cuda::Sm90Engine<core::Float16, 64>>("sm90a f16, 64 rows").suite());
  add(KernelCases<cuda::Sm90Engine<core::BFloat16, 64>>("sm90a bf16, 64 rows").protocol(schedules));
  return cases;
}

}  // namespace flashmoe::testing
