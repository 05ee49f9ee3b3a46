// Tests of the whole kernel with the network transport, on the emulator.
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
  const auto add = [&](std::vector<Case> more) {
    std::move(more.begin(), more.end(), std::back_inserter(cases));
  };
  add(NetworkCases<cuda::Sm80Engine<core::BFloat16, 64>>("sm80 bf16, network").suite());
  const NetworkCases<cuda::Sm90Engine<core::BFloat16, 64>> sm90("sm90a bf16, network");
  add(sm90.suite());
  // What puts do to the protocol does not depend on the engine.
  add(sm90.protocol(schedules));
  return cases;
}

}  // namespace
}  // namespace flashmoe::testing

int main(int argc, char** argv) {
  return flashmoe::testing::run_cases(argc, argv, flashmoe::testing::network_cases);
}
