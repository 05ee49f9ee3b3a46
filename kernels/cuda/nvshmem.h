// The NVSHMEM host library, loaded when a call first spans several GPUs, so that neither building
// nor importing the module needs it. Symmetric memory and its addresses are all that is used where
// GPUs address each other; kernels with the network transport also call NVSHMEM's device library.
//
// An expert group is a list of NVSHMEM's numbers of its PEs, not an NVSHMEM team, which would
// narrow nothing: symmetric memory is allocated and freed by all PEs of the world together, and
// barriers are needed only then. What the kernel exchanges itself needs addresses, or numbers, of
// PEs alone.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace flashmoe::cuda {

struct NvshmemVersion {
  int32_t major, minor, patch;

  friend auto operator<=>(const NvshmemVersion&, const NvshmemVersion&) = default;
};

// The interface below is that of this release, and of later ones of the same major version.
inline constexpr NvshmemVersion kNvshmemBuiltFor{3, 3, 24};

class Nvshmem {
 public:
  // Names the processes that start together; process 0 makes it.
  using UniqueId = std::array<std::byte, 128>;

  // Loads the library from `path`, or from where the loader finds it if that is empty. Throws
  // std::runtime_error if it is not there or its version does not fit.
  explicit Nvshmem(const std::string& path);
  Nvshmem(const Nvshmem&) = delete;
  Nvshmem& operator=(const Nvshmem&) = delete;

  NvshmemVersion version() const { return version_; }
  UniqueId unique_id() const;
  // Collective over all processes: PE `rank` of `count` starts, on GPU `gpu`, which is current, and
  // which must be current whenever anything collective is called.
  void start(const UniqueId& id, int32_t rank, int32_t count, int32_t gpu);
  bool started() const { return started_; }
  int32_t rank() const { return rank_; }
  int32_t count() const { return count_; }
  int32_t gpu() const { return gpu_; }

  // Collective. Throws if any memory could not be had. The memory is not zeroed.
  std::byte* allocate(int64_t bytes) const;
  // Collective, of memory that allocate() returned.
  void free(std::byte* symmetric) const;
  // Where this GPU reaches the same place of symmetric memory at PE `pe`; null: it does not.
  std::byte* address(std::byte* symmetric, int32_t pe) const;
  // Whether this GPU addresses the symmetric memory of PE `pe`.
  bool reaches(int32_t pe) const { return address(probe_, pe) != nullptr; }
  // [PE][other PE] what reaches() says on all PEs, so that all of them draw the same conclusions.
  void set_reach(std::vector<bool> reach);
  // Whether in every one of the groups, [groups][pes_of_group], all PEs reach each other.
  bool reach_each_other(std::span<const int32_t> groups, int32_t pes_of_group) const;
  // Makes device code that calls NVSHMEM ready on the current GPU: a CUlibrary, linked with a
  // device library that is not newer than this host library. NVSHMEM compares the two.
  void initialize(void* library) const;
  // Collective.
  void barrier() const;

 private:
  template <typename Function>
  Function find(const char* name) const;

  void* library_;
  NvshmemVersion version_{};
  bool started_ = false;
  int32_t rank_ = 0;
  int32_t count_ = 1;
  int32_t gpu_ = 0;
  std::byte* probe_ = nullptr;  // symmetric, for reaches()
  std::vector<bool> reach_;
};

}  // namespace flashmoe::cuda
