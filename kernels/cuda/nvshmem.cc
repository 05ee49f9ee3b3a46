#include "kernels/cuda/nvshmem.h"

#include <dlfcn.h>

#include <bit>
#include <stdexcept>
#include <utility>

namespace flashmoe::cuda {
namespace {

constexpr const char* kLibrary = "libnvshmem_host.so.3";
constexpr unsigned kInitWithUniqueId = 1u << 3;

// What nvshmemx_hostlib_init_attr takes, in version 1 of its layout, which every release of major
// version 3 knows. `version` of a structure is its layout's version, then its size.
struct UniqueIdArguments {
  int version;
  void* id;
  int rank;
  int count;
};
struct InitArguments {
  int version;
  UniqueIdArguments unique_id;
  char reserved[96];
};
struct InitAttributes {
  int version;
  void* mpi_communicator;
  InitArguments arguments;
};
static_assert(sizeof(UniqueIdArguments) == 24);
static_assert(sizeof(InitArguments) == 128);
static_assert(sizeof(InitAttributes) == 144);

template <typename T>
constexpr int kLayoutVersion = (1 << 16) + static_cast<int>(sizeof(T));

std::string text(const NvshmemVersion& version) {
  return std::to_string(version.major) + "." + std::to_string(version.minor) + "." +
         std::to_string(version.patch);
}

}  // namespace

template <typename Function>
Function Nvshmem::find(const char* name) const {
  void* const symbol = dlsym(library_, name);
  if (symbol == nullptr) {
    throw std::runtime_error(std::string(kLibrary) + " has no function " + name);
  }
  return reinterpret_cast<Function>(symbol);
}

Nvshmem::Nvshmem(const std::string& path)
    : library_(dlopen(path.empty() ? kLibrary : path.c_str(), RTLD_NOW | RTLD_GLOBAL)) {
  if (library_ == nullptr) {
    const char* reason = dlerror();
    throw std::runtime_error("the NVSHMEM host library could not be loaded (" +
                             std::string(reason == nullptr ? "unknown reason" : reason) +
                             "); install it with: pip install nvidia-nvshmem-cu13");
  }
  find<void (*)(int*, int*, int*)>("nvshmemx_vendor_get_version_info")(
      &version_.major, &version_.minor, &version_.patch);
  if (version_.major != kNvshmemBuiltFor.major || version_ < kNvshmemBuiltFor) {
    throw std::runtime_error(
        "NVSHMEM " + text(version_) + " was found, but this package was built for " +
        text(kNvshmemBuiltFor) + " and later ones of the same major version; install one with: " +
        "pip install \"nvidia-nvshmem-cu13>=" + text(kNvshmemBuiltFor) + "\"");
  }
}

Nvshmem::UniqueId Nvshmem::unique_id() const {
  UniqueId id{};
  const int version = kLayoutVersion<UniqueId>;
  const auto bytes = std::bit_cast<std::array<std::byte, sizeof(version)>>(version);
  for (size_t i = 0; i < bytes.size(); ++i) id[i] = bytes[i];
  if (find<int (*)(void*)>("nvshmemx_get_uniqueid")(id.data()) != 0) {
    throw std::runtime_error("nvshmemx_get_uniqueid failed");
  }
  return id;
}

void Nvshmem::start(const UniqueId& id, int32_t rank, int32_t count, int32_t gpu) {
  UniqueId copy = id;
  InitAttributes attributes{};
  attributes.version = kLayoutVersion<InitAttributes>;
  attributes.arguments.version = kLayoutVersion<InitArguments>;
  attributes.arguments.unique_id = {kLayoutVersion<UniqueIdArguments>, copy.data(), rank, count};
  const int status =
      find<int (*)(unsigned, void*)>("nvshmemx_hostlib_init_attr")(kInitWithUniqueId, &attributes);
  if (status != 0) {
    throw std::runtime_error("NVSHMEM did not start: nvshmemx_hostlib_init_attr returned " +
                             std::to_string(status) +
                             "; NVSHMEM_DEBUG=INFO in the environment makes it say why");
  }
  rank_ = find<int (*)()>("nvshmem_my_pe")();
  count_ = find<int (*)()>("nvshmem_n_pes")();
  if (rank_ != rank || count_ != count) {
    throw std::runtime_error("NVSHMEM started this process as PE " + std::to_string(rank_) +
                             " of " + std::to_string(count_) + " instead of " +
                             std::to_string(rank) + " of " + std::to_string(count));
  }
  gpu_ = gpu;
  probe_ = allocate(1);
  started_ = true;
}

std::byte* Nvshmem::allocate(int64_t bytes) const {
  void* const data = find<void* (*)(size_t)>("nvshmem_malloc")(static_cast<size_t>(bytes));
  if (data == nullptr) {
    throw std::runtime_error(
        "nvshmem_malloc found no " + std::to_string(bytes) +
        " bytes; raise NVSHMEM_SYMMETRIC_SIZE (bytes), and lower XLA_PYTHON_CLIENT_MEM_FRACTION so "
        "that it fits beside the memory that XLA takes. flashmoe_jax.runtime.reset() frees what "
        "calls of other sizes keep");
  }
  return static_cast<std::byte*>(data);
}

void Nvshmem::free(std::byte* symmetric) const { find<void (*)(void*)>("nvshmem_free")(symmetric); }

std::byte* Nvshmem::address(std::byte* symmetric, int32_t pe) const {
  return static_cast<std::byte*>(find<void* (*)(const void*, int)>("nvshmem_ptr")(symmetric, pe));
}

void Nvshmem::set_reach(std::vector<bool> reach) {
  if (static_cast<int64_t>(reach.size()) != int64_t{count_} * count_) {
    throw std::invalid_argument("a reach of other PEs than those that started");
  }
  reach_ = std::move(reach);
}

bool Nvshmem::reach_each_other(std::span<const int32_t> groups, int32_t pes_of_group) const {
  if (reach_.empty()) throw std::runtime_error("it is not known yet which PEs reach each other");
  for (size_t i = 0; i < groups.size(); ++i) {
    const auto pes = static_cast<size_t>(pes_of_group);
    for (const int32_t other : groups.subspan(i / pes * pes, pes)) {
      if (!reach_[static_cast<size_t>(int64_t{groups[i]} * count_ + other)]) return false;
    }
  }
  return true;
}

void Nvshmem::initialize(void* library) const {
  const int status = find<int (*)(void*)>("nvshmemx_culibrary_init")(library);
  if (status != 0) {
    throw std::runtime_error(
        "NVSHMEM " + text(version_) + " refused the kernels that send over a network: " +
        "nvshmemx_culibrary_init returned " + std::to_string(status) +
        "; it must not be older than the one that they were built with, so install the newest: "
        "pip install --upgrade nvidia-nvshmem-cu13. NVSHMEM_DEBUG=INFO in the environment makes "
        "it say why");
  }
}

void Nvshmem::barrier() const { find<void (*)()>("nvshmem_barrier_all")(); }

}  // namespace flashmoe::cuda
