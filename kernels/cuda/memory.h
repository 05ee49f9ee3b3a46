// Memory for the kernel that outlives a launch, and how errors of the CUDA runtime are reported.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "kernels/cuda/workspace.h"

namespace flashmoe::cuda {

// Throws std::runtime_error, with what was tried and what CUDA says, unless `status` is success.
void check_cuda(cudaError_t status, const std::string& what);

// Makes a GPU current for this thread for as long as it lives. After it, the thread has the context
// that it had, which may be none: cudaSetDevice would make one on GPU 0 for it.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t ordinal);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  CUcontext before_ = nullptr;
};

// Zeroed memory of the current GPU.
class DeviceMemory {
 public:
  explicit DeviceMemory(int64_t bytes);

  std::byte* data() const { return data_.get(); }
  // Waits until it is done.
  void zero();

 private:
  struct Free {
    void operator()(std::byte* data) const;
  };
  int64_t bytes_;
  std::unique_ptr<std::byte, Free> data_;
};

// An ErrorRecord that the current GPU writes and the host reads at any time.
class MappedError {
 public:
  MappedError();

  ErrorRecord* device() const { return device_; }
  ErrorRecord read() const;

 private:
  struct Free {
    void operator()(ErrorRecord* record) const;
  };
  std::unique_ptr<ErrorRecord, Free> host_;
  ErrorRecord* device_ = nullptr;
};

}  // namespace flashmoe::cuda
