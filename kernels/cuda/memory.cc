#include "kernels/cuda/memory.h"

#include <atomic>
#include <stdexcept>

#include "kernels/cuda/driver.h"

namespace flashmoe::cuda {

void check_cuda(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(what + ": " + cudaGetErrorName(status) + ", " +
                           cudaGetErrorString(status));
}

namespace {

struct ContextFunctions {
  decltype(&cuCtxGetCurrent) get;
  decltype(&cuCtxSetCurrent) set;
};

const ContextFunctions& context_functions() {
  static const ContextFunctions functions{
      reinterpret_cast<decltype(&cuCtxGetCurrent)>(driver_function("cuCtxGetCurrent", 4000)),
      reinterpret_cast<decltype(&cuCtxSetCurrent)>(driver_function("cuCtxSetCurrent", 4000))};
  return functions;
}

}  // namespace

DeviceGuard::DeviceGuard(int32_t ordinal) {
  // A driver that nobody has used yet refuses, and then there is no context.
  if (context_functions().get(&before_) != CUDA_SUCCESS) before_ = nullptr;
  check_cuda(cudaSetDevice(ordinal), "cudaSetDevice");
}

DeviceGuard::~DeviceGuard() { context_functions().set(before_); }

DeviceMemory::DeviceMemory(int64_t bytes) : bytes_(bytes) {
  void* data = nullptr;
  check_cuda(cudaMalloc(&data, static_cast<size_t>(bytes)),
             "allocating " + std::to_string(bytes) +
                 " bytes of GPU memory beside what XLA has taken for itself, which "
                 "XLA_PYTHON_CLIENT_MEM_FRACTION makes less, and what calls of other sizes keep, "
                 "which flashmoe_jax.runtime.reset() frees");
  data_.reset(static_cast<std::byte*>(data));
  zero();
}

void DeviceMemory::zero() {
  check_cuda(cudaMemset(data_.get(), 0, static_cast<size_t>(bytes_)), "zeroing GPU memory");
  check_cuda(cudaDeviceSynchronize(), "zeroing GPU memory");
}

// At the end of the process the driver may be gone before the memory; there is nothing to report.
void DeviceMemory::Free::operator()(std::byte* data) const { cudaFree(data); }
void MappedError::Free::operator()(ErrorRecord* record) const { cudaFreeHost(record); }

MappedError::MappedError() {
  void* host = nullptr;
  check_cuda(cudaHostAlloc(&host, sizeof(ErrorRecord), cudaHostAllocMapped | cudaHostAllocPortable),
             "allocating pinned memory");
  host_.reset(new (host) ErrorRecord{});
  void* device = nullptr;
  check_cuda(cudaHostGetDevicePointer(&device, host, 0), "mapping pinned memory");
  device_ = static_cast<ErrorRecord*>(device);
}

ErrorRecord MappedError::read() const {
  ErrorRecord record{};
  record.failure = std::atomic_ref(host_->failure).load(std::memory_order_acquire);
  if (record.failure == static_cast<uint32_t>(Failure::kNone)) return record;
  record.pe = host_->pe;
  record.awaited = host_->awaited;
  record.expected = host_->expected;
  record.seen = host_->seen;
  return record;
}

}  // namespace flashmoe::cuda
