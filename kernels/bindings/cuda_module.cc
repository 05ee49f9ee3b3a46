// The extension of the CUDA kernel: its XLA handlers, and what Python asks of their state. It
// imports on a machine without a GPU, to say so.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/cuda/arguments.h"
#include "kernels/cuda/failure.h"
#include "kernels/cuda/ffi_handlers.h"
#include "kernels/cuda/gpu.h"
#include "kernels/cuda/memory.h"
#include "kernels/cuda/nvshmem.h"
#include "kernels/cuda/runtime.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashmoe {
namespace {

using cuda::Runtime;
using Version = std::tuple<int32_t, int32_t, int32_t>;

nb::capsule handler(XLA_FFI_Error* (*function)(XLA_FFI_CallFrame*)) {
  return nb::capsule(reinterpret_cast<void*>(function));
}

Version tuple_of(const cuda::NvshmemVersion& version) {
  return {version.major, version.minor, version.patch};
}

core::DType dtype_of(const std::string& name) {
  if (name == "float32") return core::DType::kFloat32;
  if (name == "bfloat16") return core::DType::kBFloat16;
  if (name == "float16") return core::DType::kFloat16;
  throw std::invalid_argument("the kernel does not compute " + name);
}

// As CUDA writes its versions: 13000 is 13.0.
std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

int32_t gpu_count() {
  int driver = 0, count = 0;
  cuda::check_cuda(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  if (driver == 0) return 0;  // there is none
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorNoDevice) return 0;
  cuda::check_cuda(status, "looking for GPUs");
  return count;
}

nb::tuple free_and_total_memory(int32_t gpu) {
  const cuda::DeviceGuard guard(gpu);
  size_t free = 0, total = 0;
  cuda::check_cuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return nb::make_tuple(free, total);
}

std::string pci_bus_id(int32_t gpu) {
  char text[32];
  cuda::check_cuda(cudaDeviceGetPCIBusId(text, sizeof text, gpu), "cudaDeviceGetPCIBusId");
  return text;
}

// Whether no signal is lost on the way to another GPU: signals are additions to a peer's memory.
// True where that GPU is hidden, so that nobody knows, and where this one does not address it.
bool peer_atomics(int32_t gpu, const std::string& bus_id) {
  int peer = 0, atomics = 0;
  if (cudaDeviceGetByPCIBusId(&peer, bus_id.c_str()) != cudaSuccess) {
    cudaGetLastError();  // that another process's GPU is hidden from this one is no error
    return true;
  }
  int access = 0;
  if (peer != gpu) {
    cuda::check_cuda(cudaDeviceCanAccessPeer(&access, gpu, peer), "cudaDeviceCanAccessPeer");
  }
  if (access == 0) return true;  // itself, or one that is reached over a network
  cuda::check_cuda(
      cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, gpu, peer),
      "cudaDeviceGetP2PAttribute");
  return atomics != 0;
}

nb::dict gpu(int32_t ordinal) {
  cudaDeviceProp properties;
  cuda::check_cuda(cudaGetDeviceProperties(&properties, ordinal), "cudaGetDeviceProperties");
  nb::dict dict;
  dict["ordinal"] = ordinal;
  dict["name"] = std::string(properties.name);
  dict["compute_capability"] =
      std::to_string(properties.major) + "." + std::to_string(properties.minor);
  dict["multiprocessors"] = properties.multiProcessorCount;
  dict["pci_bus_id"] = pci_bus_id(ordinal);
  nb::list peers;
  for (int32_t peer = 0; peer < gpu_count(); ++peer) {
    int access = 0;
    if (peer != ordinal) {
      cuda::check_cuda(cudaDeviceCanAccessPeer(&access, ordinal, peer), "cudaDeviceCanAccessPeer");
    }
    if (access != 0) peers.append(peer);
  }
  dict["peers"] = peers;
  return dict;
}

cuda::Nvshmem& nvshmem() {
  cuda::Nvshmem* const library = Runtime::instance().nvshmem();
  if (library == nullptr) throw std::runtime_error("NVSHMEM has not been loaded");
  return *library;
}

void bind_handlers(nb::module_& m) {
  m.def(
      "handlers",
      [] {
        nb::dict stages, dict;
        stages["initialize"] = handler(cuda::initialize);
        stages["execute"] = handler(cuda::forward);
        dict["flashmoe_forward"] = stages;
        return dict;
      },
      "Targets and their handlers by stage, for jax.ffi.register_ffi_target.");
  m.def(
      "limits",
      [] {
        nb::dict dict;
        dict["num_experts"] = cuda::kExpertLimit;
        dict["experts_per_token"] = cuda::kExpertsPerTokenLimit;
        dict["num_pes"] = cuda::kMaxPes;
        dict["row_bytes"] = cuda::kRowAlignment;
        return dict;
      },
      "The largest sizes that the kernel takes, and what the bytes of a row are a multiple of.");
}

void bind_gpus(nb::module_& m) {
  m.def(
      "versions",
      [] {
        nb::dict dict;
        dict["built with"] = version_text(CUDART_VERSION);
        int driver = 0;
        cuda::check_cuda(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
        dict["of the driver"] = driver == 0 ? std::string("none") : version_text(driver);
        return dict;
      },
      "CUDA versions.");
  m.def("gpu_count", gpu_count, "Raises RuntimeError where CUDA cannot say.");
  m.def("gpu", gpu, "ordinal"_a,
        "Its name, compute capability, multiprocessors, PCI bus id and peers.");
  m.def("peer_atomics", peer_atomics, "gpu"_a, "pci_bus_id"_a,
        "Whether a GPU that addresses another's memory has native atomics there; true if unknown.");
  m.def("free_and_total_memory", free_and_total_memory, "gpu"_a, "Bytes.");
}

void bind_runtime(nb::module_& m) {
  nb::class_<cuda::CallSizes>(m, "CallSizes")
      .def(
          "__init__",
          [](cuda::CallSizes* sizes, int32_t num_pes, int32_t tokens, int32_t hidden,
             int32_t intermediate, int32_t num_experts, int32_t experts_per_token, int64_t capacity,
             int64_t max_rows, const std::string& dtype, bool exact) {
            new (sizes)
                cuda::CallSizes{num_pes,           tokens,   hidden,   intermediate,    num_experts,
                                experts_per_token, capacity, max_rows, dtype_of(dtype), exact};
          },
          nb::kw_only(), "num_pes"_a, "tokens"_a, "hidden"_a, "intermediate"_a, "num_experts"_a,
          "experts_per_token"_a, "capacity"_a, "max_rows"_a, "dtype"_a, "exact"_a);
  m.def(
      "required_memory",
      [](const cuda::CallSizes& sizes, int32_t gpu) {
        const cuda::Configuration configuration =
            cuda::configure(sizes, cuda::gpu_properties(gpu), 1);
        return nb::make_tuple(configuration.heap_bytes(), configuration.workspace.bytes,
                              configuration.shape.recv_rows());
      },
      "sizes"_a, "gpu"_a,
      "Bytes of the symmetric heap and of the workspace of a PE, rows of its receive buffer.");
  m.def(
      "failures", [] { return Runtime::instance().failures(); },
      nb::call_guard<nb::gil_scoped_release>(), "Waits for the GPUs; how their calls failed.");
  m.def(
      "reset", [] { Runtime::instance().reset(); }, nb::call_guard<nb::gil_scoped_release>(),
      "Frees all symmetric heaps. Collective once NVSHMEM has started.");
  m.def(
      "reserved_bytes", [](int32_t gpu) { return Runtime::instance().reserved_bytes(gpu); },
      "gpu"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "describe_failure",
      [](uint32_t failure, int32_t pe, int64_t awaited, uint64_t expected, uint64_t seen,
         int32_t num_experts, int32_t experts_per_token) {
        core::Shape shape{};
        shape.num_experts = num_experts;
        shape.experts_per_token = experts_per_token;
        return cuda::describe({failure, pe, awaited, expected, seen}, shape);
      },
      nb::kw_only(), "failure"_a, "pe"_a, "awaited"_a, "expected"_a, "seen"_a, "num_experts"_a,
      "experts_per_token"_a, "What the host says of an error record of the kernel.");
}

void bind_nvshmem(nb::module_& m) {
  m.attr("NVSHMEM_BUILT_FOR") = tuple_of(cuda::kNvshmemBuiltFor);
  m.def(
      "load_nvshmem",
      [](const std::string& path) {
        const nb::gil_scoped_release unlocked;
        return tuple_of(Runtime::instance().load_nvshmem(path).version());
      },
      "path"_a, "Loads the NVSHMEM host library and returns its version.");
  m.def("nvshmem_unique_id", [] {
    const cuda::Nvshmem::UniqueId id = nvshmem().unique_id();
    return nb::bytes(id.data(), id.size());
  });
  m.def(
      "start_nvshmem",
      [](const nb::bytes& id, int32_t rank, int32_t count, int32_t gpu) {
        cuda::Nvshmem::UniqueId unique_id;
        if (id.size() != unique_id.size()) throw std::invalid_argument("a unique id has 128 bytes");
        std::memcpy(unique_id.data(), id.data(), id.size());
        const nb::gil_scoped_release unlocked;
        // NVSHMEM keeps to the GPU that is current when it starts.
        cuda::check_cuda(cudaSetDevice(gpu), "cudaSetDevice");
        nvshmem().start(unique_id, rank, count, gpu);
      },
      "id"_a, "rank"_a, "count"_a, "gpu"_a, "Collective over all processes.");
  m.def(
      "nvshmem_reach",
      [] {
        std::vector<bool> reach;
        for (int32_t pe = 0; pe < nvshmem().count(); ++pe) reach.push_back(nvshmem().reaches(pe));
        return reach;
      },
      "Of each process, whether this one's GPU addresses its symmetric memory.");
  m.def(
      "set_nvshmem_reach", [](std::vector<bool> reach) { nvshmem().set_reach(std::move(reach)); },
      "reach"_a, "What nvshmem_reach says in all processes, one after the other.");
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.doc() = "XLA FFI handlers and run-time state of the CUDA kernel.";
  bind_handlers(m);
  bind_gpus(m);
  bind_runtime(m);
  bind_nvshmem(m);
}

}  // namespace flashmoe
