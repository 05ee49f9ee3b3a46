#include "kernels/cuda/runtime.h"

#include <algorithm>
#include <stdexcept>

#include "kernels/cuda/failure.h"

namespace flashmoe::cuda {

Reservation::Reservation(const CallSizes& sizes, int32_t gpu)
    : gpu_(gpu_properties(gpu)), configuration_(configure(sizes, gpu_, 1)) {
  const DeviceGuard guard(gpu);
  load(configuration_, gpu_);
  memory_ = std::make_unique<PeMemory>(configuration_);
  own_heap_ = std::make_unique<DeviceMemory>(configuration_.heap.bytes);
  heaps_.push_back(own_heap_->data());
}

// What throws before the heap is allocated does so in all processes, whose GPUs are alike.
Reservation::Reservation(const CallSizes& sizes, int32_t gpu, const Group& group,
                         const Nvshmem& nvshmem,
                         const std::function<const NetworkKernels&()>& network)
    : gpu_(gpu_properties(gpu)),
      configuration_(configure(sizes, gpu_, 1)),
      rank_(group.rank),
      nvshmem_(&nvshmem),
      processes_(group.processes) {
  const DeviceGuard guard(gpu);
  std::byte* const symmetric = nvshmem.allocate(configuration_.heap_bytes());
  for (const int32_t process : group.processes) {
    heaps_.push_back(nvshmem.address(symmetric, process));
  }
  try {
    for (size_t i = 0; i < heaps_.size() && !sizes.network; ++i) {
      if (heaps_[i] != nullptr) continue;
      throw std::runtime_error(
          "GPU " + std::to_string(gpu) + " of process " + std::to_string(nvshmem.rank()) +
          " cannot address the memory of process " + std::to_string(processes_[i]) +
          ", which it could when NVSHMEM started");
    }
    if (sizes.network) configuration_.kernel = network().find(sizes.dtype);
    load(configuration_, gpu_);
    memory_ = std::make_unique<PeMemory>(configuration_);
    check_cuda(cudaMemset(symmetric, 0, static_cast<size_t>(configuration_.heap_bytes())),
               "zeroing the symmetric heap");
    check_cuda(cudaDeviceSynchronize(), "zeroing the symmetric heap");
  } catch (const std::exception& error) {
    why_unusable_ = error.what();
  }
  nvshmem.barrier();  // Nobody writes into a heap that is not zeroed yet.
}

Reservation::~Reservation() {
  if (nvshmem_ == nullptr) return;
  const DeviceGuard guard(gpu_.ordinal);
  nvshmem_->free(heaps_[rank_]);
}

void Reservation::launch(const Call& call, const PeBuffers& buffers, cudaStream_t stream) const {
  if (!why_unusable_.empty()) throw std::runtime_error(why_unusable_);
  if (const std::optional<std::string> message = failure()) {
    throw std::runtime_error("an earlier call failed: " + *message +
                             ". Its y is NaN. flashmoe_jax.runtime.reset() lets "
                             "calls have a new symmetric heap");
  }
  const DeviceGuard guard(gpu_.ordinal);
  const PePlace place = memory_->place();
  cuda::launch(configuration_, call, rank_, heaps_, {&place, 1}, {&buffers, 1}, stream, processes_);
}

std::optional<std::string> Reservation::failure() const {
  if (!why_unusable_.empty()) return why_unusable_;
  const ErrorRecord error = memory_->error();
  if (error.failure == static_cast<uint32_t>(Failure::kNone)) return std::nullopt;
  return describe(error, configuration_.shape);
}

void Reservation::synchronize() const {
  const DeviceGuard guard(gpu_.ordinal);
  check_cuda(cudaDeviceSynchronize(), "waiting for GPU " + std::to_string(gpu_.ordinal));
}

Runtime& Runtime::instance() {
  // Never destroyed: at the end of the process the driver may be gone before it.
  static Runtime* const runtime = new Runtime;
  return *runtime;
}

Nvshmem& Runtime::load_nvshmem(const std::string& path) {
  const std::lock_guard making(making_);
  if (nvshmem_ == nullptr) nvshmem_ = std::make_unique<Nvshmem>(path);
  return *nvshmem_;
}

void Runtime::reserve(const CallKind& kind, int32_t gpu) {
  const std::lock_guard making(making_);
  if (look_up(kind, gpu) != nullptr) return;
  std::shared_ptr<Reservation> reservation;
  if (kind.sizes.num_pes == 1) {
    reservation = std::make_shared<Reservation>(kind.sizes, gpu);
  } else {
    const Group group = group_of(kind);
    CallSizes sizes = kind.sizes;
    // Of all groups alike, since symmetric memory is of the same size on all PEs.
    sizes.network = !nvshmem_->reach_each_other(kind.groups, sizes.num_pes);
    reservation =
        std::make_shared<Reservation>(sizes, gpu, group, *nvshmem_, [&]() -> const NetworkKernels& {
          if (network_ == nullptr) {
            network_ = std::make_unique<NetworkKernels>(gpu_properties(gpu), *nvshmem_);
          }
          return *network_;
        });
  }
  const std::lock_guard lock(mutex_);
  entries_.push_back({kind, std::move(reservation)});
}

std::shared_ptr<const Reservation> Runtime::find(const CallKind& kind, int32_t gpu) const {
  std::shared_ptr<const Reservation> found = look_up(kind, gpu);
  if (found == nullptr) {
    throw std::runtime_error(
        "there is no symmetric heap for this call; flashmoe_jax.runtime.reset() must not be called "
        "while a program starts");
  }
  return found;
}

std::shared_ptr<Reservation> Runtime::look_up(const CallKind& kind, int32_t gpu) const {
  const std::lock_guard lock(mutex_);
  const auto found = std::ranges::find_if(entries_, [&](const Entry& entry) {
    return entry.reservation->gpu() == gpu && entry.kind == kind;
  });
  return found == entries_.end() ? nullptr : found->reservation;
}

Group Runtime::group_of(const CallKind& kind) const {
  if (nvshmem_ == nullptr || !nvshmem_->started()) {
    throw std::runtime_error("NVSHMEM has not been started: flashmoe_jax.runtime.start() does");
  }
  const auto found = std::ranges::find(kind.groups, nvshmem_->rank());
  const int64_t place = found - kind.groups.begin();
  const int64_t pes = kind.sizes.num_pes, first = place / pes * pes;
  if (first + pes > static_cast<int64_t>(kind.groups.size())) {
    throw std::runtime_error("process " + std::to_string(nvshmem_->rank()) +
                             " is in no expert group of the call");
  }
  return {static_cast<int32_t>(place % pes),
          {kind.groups.begin() + first, kind.groups.begin() + first + pes}};
}

std::vector<Runtime::Entry> Runtime::entries() const {
  const std::lock_guard lock(mutex_);
  return entries_;
}

std::vector<std::string> Runtime::failures() const {
  std::vector<std::string> messages;
  for (const Entry& entry : entries()) {
    entry.reservation->synchronize();
    if (const std::optional<std::string> message = entry.reservation->failure()) {
      messages.push_back(*message);
    }
  }
  return messages;
}

void Runtime::reset() {
  const std::lock_guard making(making_);
  for (const Entry& entry : entries()) entry.reservation->synchronize();
  // A PE that failed may have left puts on their way.
  if (network_ != nullptr) network_->quiet();
  if (nvshmem_ != nullptr && nvshmem_->started()) {
    // Not before every peer has ended its launches.
    const DeviceGuard guard(nvshmem_->gpu());
    nvshmem_->barrier();
  }
  std::vector<Entry> freed;
  const std::lock_guard lock(mutex_);
  freed.swap(entries_);
}

int64_t Runtime::reserved_bytes(int32_t gpu) const {
  int64_t bytes = 0;
  for (const Entry& entry : entries()) {
    const Reservation& reservation = *entry.reservation;
    if (reservation.gpu() == gpu) bytes += reservation.configuration().bytes();
  }
  return bytes;
}

}  // namespace flashmoe::cuda
