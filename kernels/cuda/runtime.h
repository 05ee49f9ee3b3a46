// The memory of the calls of this process. It is made on a GPU before a program is executed there
// for the first time (XLA's stage "initialize"), never inside a call: allocating waits for the GPU,
// which may be waiting for a peer. One heap serves all calls of the same sizes, since the calls of
// a GPU's stream follow each other and all PEs execute them in the same order; the tag of a call
// tells where they do not.
//
// XLA's stage "prepare" would be earlier, but has no stream, and in many of its releases no device.
// Tracing and compiling are no place for it either: a process may do that for a program that it
// never executes, or that others have compiled already, and allocating needs all of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "kernels/cuda/gpu.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/memory.h"
#include "kernels/cuda/network_kernels.h"
#include "kernels/cuda/nvshmem.h"

namespace flashmoe::cuda {

// What calls must have in common to share a heap.
struct CallKind {
  CallSizes sizes;
  // [groups][P] the processes of every expert group in the order of their ranks; empty for one PE.
  std::vector<int32_t> groups;

  friend bool operator==(const CallKind&, const CallKind&) = default;
};

// The expert group of this process.
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

 private:
  DeviceMemory workspace_;
  MappedError error_;
};

// What calls of one kind keep on one GPU of this process.
class Reservation {
 public:
  // For one PE.
  Reservation(const CallSizes& sizes, int32_t gpu);
  // For a PE of a group. Collective over all processes. `network` gives the kernels for sizes with
  // the network transport; it may throw.
  Reservation(const CallSizes& sizes, int32_t gpu, const Group& group, const Nvshmem& nvshmem,
              const std::function<const NetworkKernels&()>& network);
  // Collective where the constructor was.
  ~Reservation();
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  const Configuration& configuration() const { return configuration_; }
  // Throws if an earlier launch failed.
  void launch(const Call& call, const PeBuffers& buffers, cudaStream_t stream) const;
  // How the first launch that failed did so, or why there can be none.
  std::optional<std::string> failure() const;
  // Waits until the GPU has nothing left to do.
  void synchronize() const;
  int32_t gpu() const { return gpu_.ordinal; }

 private:
  Gpu gpu_;
  Configuration configuration_;
  int32_t rank_ = 0;
  const Nvshmem* nvshmem_ = nullptr;        // null: one PE
  std::unique_ptr<DeviceMemory> own_heap_;  // of one PE
  std::vector<std::byte*> heaps_;           // of all PEs; null: out of this GPU's reach
  std::vector<int32_t> processes_;          // of all PEs; empty without a group
  std::unique_ptr<PeMemory> memory_;
  // Why this process of a group cannot launch, if not empty. It is told then and not by the
  // constructor: the others would wait for it for ever in what is collective, while in a launch
  // they have a deadline.
  std::string why_unusable_;
};

class Runtime {
 public:
  static Runtime& instance();

  // Loads the NVSHMEM library, once.
  Nvshmem& load_nvshmem(const std::string& path);
  Nvshmem* nvshmem() const { return nvshmem_.get(); }

  // Makes room on a GPU for calls of that kind, unless there is. Collective over all processes for
  // several PEs.
  void reserve(const CallKind& kind, int32_t gpu);
  // What has been reserved. Throws if nothing has.
  std::shared_ptr<const Reservation> find(const CallKind& kind, int32_t gpu) const;

  // How launches failed; those still running are waited for.
  std::vector<std::string> failures() const;
  // Waits for the GPUs and frees all reservations. Collective over all processes once NVSHMEM has
  // started.
  void reset();
  // Bytes reserved on a GPU.
  int64_t reserved_bytes(int32_t gpu) const;

 private:
  struct Entry {
    CallKind kind;
    std::shared_ptr<Reservation> reservation;
  };

  // Null: there is none.
  std::shared_ptr<Reservation> look_up(const CallKind& kind, int32_t gpu) const;
  Group group_of(const CallKind& kind) const;
  std::vector<Entry> entries() const;

  // Held while anything is made or freed, which waits for GPUs and other processes.
  std::mutex making_;
  std::unique_ptr<Nvshmem> nvshmem_;
  std::unique_ptr<NetworkKernels> network_;  // on the GPU of this process, once they are needed
  // Never held while waiting for anything: who launches must not wait for who makes.
  mutable std::mutex mutex_;
  std::vector<Entry> entries_;  // few: as many as there are sizes
};

}  // namespace flashmoe::cuda
