// The protocol cases of one kernel with the transport TRANSPORT, for copies of the kernel with a
// planted fault (tools/plant_kernel_faults.py): what they take is their compilation.
#include "kernels/cuda/engine_sm90.h"
#include "kernels/cuda/network_transport.h"
#include "kernels/cuda/transport.h"
#include "tests/emulator/kernel_cases.h"
#include "tests/emulator/run_cases.h"

int main(int argc, char** argv) {
  using namespace flashmoe;
  return testing::run_cases(argc, argv, [](const testing::Schedules& schedules) {
    using Engine = cuda::Sm90Engine<core::BFloat16, 64>;
    return testing::KernelCases<Engine, cuda::TRANSPORT>("sm90a bf16").protocol(schedules);
  });
}
