// The kernels with the network transport for compute capability 9.0, compiled for sm_90a alone.
// Calls of another library keep the compiler from overlapping wgmmas and from moving registers
// between warpgroups; the smaller row blocks leave it enough of them.
#include "kernels/cuda/engine_sm90.h"
#include "kernels/cuda/global_kernel.cuh"
#include "kernels/cuda/network_transport.h"

namespace flashmoe::cuda {

template <typename Element>
using Engine = Sm90Engine<Element, kNetworkBlockRows>;

extern "C" __global__ void __launch_bounds__(Engine<core::BFloat16>::kThreads, 1)
    network_bfloat16(const __grid_constant__ KernelArguments arguments) {
  run_kernel<Engine<core::BFloat16>, NetworkTransport>(arguments);
}

extern "C" __global__ void __launch_bounds__(Engine<core::Float16>::kThreads, 1)
    network_float16(const __grid_constant__ KernelArguments arguments) {
  run_kernel<Engine<core::Float16>, NetworkTransport>(arguments);
}

extern "C" __global__ void network_quiet() { device::quiet(); }

}  // namespace flashmoe::cuda
