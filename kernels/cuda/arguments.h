// What a launch of the kernel is given. It travels by value in constant memory, so that a captured
// graph can replay it: whatever changes from launch to launch (the epoch) lives in device memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/core/heap_layout.h"
#include "kernels/core/shape.h"
#include "kernels/core/types.h"
#include "kernels/cuda/gate_arguments.h"
#include "kernels/cuda/network_layout.h"
#include "kernels/cuda/workspace.h"
#include "kernels/device/tensor_map.h"

namespace flashmoe::cuda {

inline constexpr int kMaxPes = 64;
// PEs that one launch may run, on one GPU.
inline constexpr int kMaxVirtualPes = 8;

struct TensorMaps {
  device::TensorMap received;   // [1][R][H] of the heap
  device::TensorMap activated;  // [1][R][D] of the workspace
  device::TensorMap gate;       // [El][H][D]
  device::TensorMap up;         // [El][H][D]
  device::TensorMap down;       // [El][D][H]
};

// The buffers of one PE. Parts that a layer does not have are null.
struct PeArguments {
  TensorMaps maps;         // read by the sm_90a engine only
  const void* x;           // [T, H]
  const int32_t* indices;  // [T, K], -1 masks a slot
  const float* weights;    // [T, K]
  const void* gate;        // [El, H, D]
  const void* up;          // [El, H, D]
  const void* down;        // [El, D, H]
  const void* gate_bias;   // [El, D]
  const void* up_bias;     // [El, D]
  const void* down_bias;   // [El, H]
  void* y;                 // [T, H]
  int32_t* dropped;        // [1] slots of this PE that were dropped
  std::byte* workspace;    // Workspace
  ErrorRecord* error;      // in memory that the host reads
  bool absent;             // for tests: a PE that never enters
};

// Only for kernels with the network transport.
struct NetworkArguments {
  NetworkLayout layout;
  int32_t processes[kMaxPes];  // NVSHMEM's number of each PE
};

struct KernelArguments {
  core::Shape shape;
  core::HeapLayout heap;
  WorkspaceLayout workspace;
  core::Activation activation;
  uint32_t tag;               // of the call site
  uint64_t deadline;          // of every wait, nanoseconds
  int32_t first_pe;           // rank of pes[0]
  int32_t ctas;               // of each PE; the launch has as many for each of its PEs
  bool check_weights;         // a slot weight that is not finite is an error
  bool remote;                // some PE is on another GPU
  bool routes;                // the gate runs inside: `gate` says how
  std::byte* heaps[kMaxPes];  // the heap of each PE, as this GPU addresses it; null: it cannot
  GateArguments gates[kMaxVirtualPes];
  PeArguments pes[kMaxVirtualPes];
  NetworkArguments network;
};

}  // namespace flashmoe::cuda
