#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/engine_sm80.h"
#include "tests/emulator/cases.h"
#include "tests/emulator/kernel_cases.h"

namespace flashmoe::testing {

std::vector<Case> kernel_cases_sm80(const Schedules& schedules) {
  std::vector<Case> cases;
  const auto add = [&](std::vector<Case> more) {
    std::move(more.begin(), more.end(), std::back_inserter(cases));
  };
  add(KernelCases<cuda::Sm80Engine<core::BFloat16, 128>>("sm80 bf16, 128 rows").suite());
  add(KernelCases<cuda::Sm80Engine<core::BFloat16, 64>>("sm80 bf16, 64 rows").suite());
  add(KernelCases<cuda::Sm80Engine<core::Float16, 64>>("sm80 f16, 64 rows").suite());
  add(KernelCases<cuda::Sm80Engine<float, 64>>("sm80 f32, 64 rows").suite());
  using Tf32Engine = cuda::Sm80Engine<float, 64, cuda::FloatProduct::kTf32>;
  add(KernelCases<Tf32Engine>("sm80 tf32, 64 rows").suite(2));  // the products differ, no more
  add(KernelCases<cuda::Sm80Engine<core::BFloat16, 64>>("sm80 bf16, 64 rows").protocol(schedules));
  return cases;
}

}  // namespace flashmoe::testing
