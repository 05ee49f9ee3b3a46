// Tests of the whole kernel with the network transport, on the emulator. A program of its own, so
// that faults planted in the kernel need not be compiled into both (tools/plant_kernel_faults.py).
#include <iterator>
#include <utility>
#include <vector>

#include "kernels/cuda/engine_sm80.h"
#include "kernels/cuda/engine_sm90.h"
#include "kernels/cuda/network_transport.h"
#include "tests/emulator/cases.h"
#include "tests/emulator/kernel_cases.h"
#include "tests/emulator/run_cases.h"

namespace flashmoe::testing {
namespace {

template <typename Engine>
using NetworkCases = KernelCases<Engine, cuda::NetworkTransport>;

std::vector<Case> network_cases(const Schedules& schedules) {
  std::vector<Case> cases;
  const auto add = [&](const auto& of_engine) {
    for (std::vector<Case> more : {of_engine.suite(), of_engine.protocol(schedules)}) {
      std::move(more.begin(), more.end(), std::back_inserter(cases));
    }
  };
  add(NetworkCases<cuda::Sm80Engine<core::BFloat16, 64>>("sm80 bf16, network"));
  add(NetworkCases<cuda::Sm90Engine<core::BFloat16, 64>>("sm90a bf16, network"));
  return cases;
}

}  // namespace
}  // namespace flashmoe::testing

int main(int argc, char** argv) {
  return flashmoe::testing::run_cases(argc, argv, flashmoe::testing::network_cases);
}
