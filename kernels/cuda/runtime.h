// The memory of every call that this process may execute. It is reserved while a program is traced,
// never inside a call: allocating waits for the GPU, which may be waiting for a peer. One heap
// serves all calls of the same sizes, since the calls of a GPU's stream follow each other and all
// PEs execute them in the same order; the tag of a call tells where they do not.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels/cuda/gpu.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/memory.h"
#include "kernels/cuda/nvshmem.h"

namespace flashmoe::cuda {

// Which of the processes are the expert group of this one, in the order of their ranks.
struct Group {
  int32_t rank;
  std::vector<int32_t> processes;
};

// What a PE keeps on its GPU between launches, but for its heap.
class PeMemory {
 public:
  explicit PeMemory(const Configuration& configuration)
      : workspace_(configuration.workspace.bytes) {}

  PePlace place() const { return {workspace_.data(), error_.device()}; }
  ErrorRecord error() const { return error_.read(); }
  void reset();

 private:
  DeviceMemory workspace_;
  MappedError error_;
};

// Several PEs on one GPU, with a heap each: for tests of the protocol on a single card.
class VirtualPes {
 public:
  VirtualPes(const CallSizes& sizes, int32_t gpu);

  const Configuration& configuration() const { return configuration_; }
  void launch(const Call& call, std::span<const PeBuffers> buffers, cudaStream_t stream) const;
  ErrorRecord error(int32_t pe) const { return memory_[pe]->error(); }
  // After a failure. No launch may be in progress.
  void reset();

 private:
  Gpu gpu_;
  Configuration configuration_;
  std::vector<std::unique_ptr<DeviceMemory>> heaps_;
  std::vector<std::unique_ptr<PeMemory>> memory_;
};

// What is reserved on one GPU of this process for calls of the same sizes.
class Reservation {
 public:
  // Without a group, for one PE. Collective over all processes with one.
  Reservation(const CallSizes& sizes, int32_t gpu, const Group* group, const Nvshmem* nvshmem);

  const Configuration& configuration() const { return configuration_; }
  // Throws if an earlier launch failed.
  void launch(const Call& call, const PeBuffers& buffers, cudaStream_t stream) const;
  // How the first launch that failed did so.
  std::optional<std::string> failure() const;
  // Waits until the GPU has nothing left to do.
  void synchronize() const;
  void reset();
  int32_t gpu() const { return gpu_.ordinal; }

 private:
  Gpu gpu_;
  Configuration configuration_;
  int32_t rank_ = 0;
  std::unique_ptr<DeviceMemory> own_heap_;  // null: symmetric memory
  std::vector<std::byte*> heaps_;           // of all PEs
  std::unique_ptr<PeMemory> memory_;
};

class Runtime {
 public:
  static Runtime& instance();

  // Loads the NVSHMEM library, once.
  Nvshmem& load_nvshmem(const std::string& path);
  Nvshmem* nvshmem() const { return nvshmem_.get(); }

  // Makes room for calls of these sizes and returns what names it in the calls' attributes.
  int64_t reserve(const CallSizes& sizes, int32_t gpu, const std::optional<Group>& group);
  // The reservation with this name on a GPU. One without a group is made there if there is none.
  const Reservation& find(int64_t id, int32_t gpu);

  // How launches failed; those still running are waited for.
  std::vector<std::string> failures() const;
  // Makes all heaps anew, after a failure. Collective over all processes once NVSHMEM has started.
  void reset();
  // Bytes reserved on a GPU.
  int64_t reserved_bytes(int32_t gpu) const;

 private:
  struct Entry {
    CallSizes sizes;
    bool grouped;
    std::map<int32_t, std::unique_ptr<Reservation>> by_gpu;
  };

  // They stay where they are until the process ends.
  std::vector<Reservation*> reservations() const;

  mutable std::mutex mutex_;
  std::unique_ptr<Nvshmem> nvshmem_;
  std::vector<Entry> entries_;
};

}  // namespace flashmoe::cuda
