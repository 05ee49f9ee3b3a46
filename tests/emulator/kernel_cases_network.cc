#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/engine_sm80.h"
#include "kernels/cuda/engine_sm90.h"
#include "kernels/cuda/network_transport.h"
#include "tests/emulator/cases.h"
#include "tests/emulator/kernel_cases.h"

namespace flashmoe::testing {

std::vector<Case> kernel_cases_network(const Schedules& schedules) {
  using Sm80 = KernelCases<cuda::Sm80Engine<core::BFloat16, 64>, cuda::NetworkTransport>;
  using Sm90 = KernelCases<cuda::Sm90Engine<core::BFloat16, 64>, cuda::NetworkTransport>;
  std::vector<Case> cases;
  const auto add = [&](const auto& of_engine) {
    for (std::vector<Case> more : {of_engine.suite(), of_engine.protocol(schedules)}) {
      std::move(more.begin(), more.end(), std::back_inserter(cases));
    }
  };
  add(Sm80("sm80 bf16, network"));
  add(Sm90("sm90 bf16, network"));
  return cases;
}

}  // namespace flashmoe::testing
