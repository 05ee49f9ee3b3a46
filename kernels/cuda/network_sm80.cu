// The kernels with the network transport for compute capability 8.0 and later, compiled for sm_80.
// One size of row blocks, and for float only the products with its error; network_kernels.h says
// how they are linked and found.
#include "kernels/cuda/engine_sm80.h"
#include "kernels/cuda/global_kernel.cuh"
#include "kernels/cuda/network_transport.h"

namespace flashmoe::cuda {

template <typename Element>
using Engine = Sm80Engine<Element, kNetworkBlockRows>;

extern "C" __global__ void __launch_bounds__(Engine<core::BFloat16>::kThreads, 1)
    network_bfloat16(const __grid_constant__ KernelArguments arguments) {
  run_kernel<Engine<core::BFloat16>, NetworkTransport>(arguments);
}

extern "C" __global__ void __launch_bounds__(Engine<core::Float16>::kThreads, 1)
    network_float16(const __grid_constant__ KernelArguments arguments) {
  run_kernel<Engine<core::Float16>, NetworkTransport>(arguments);
}

extern "C" __global__ void __launch_bounds__(Engine<float>::kThreads, 1)
    network_float32(const __grid_constant__ KernelArguments arguments) {
  run_kernel<Engine<float>, NetworkTransport>(arguments);
}

extern "C" __global__ void network_quiet() { device::quiet(); }

}  // namespace flashmoe::cuda
