#include "kernels/cuda/runtime.h"

#include <stdexcept>
#include <utility>

#include "kernels/cuda/failure.h"

namespace flashmoe::cuda {

void PeMemory::reset() {
  workspace_.zero();
  error_.clear();
}

VirtualPes::VirtualPes(const CallSizes& sizes, int32_t gpu)
    : gpu_(gpu_properties(gpu)), configuration_(configure(sizes, gpu_, sizes.num_pes)) {
  load(*configuration_.variant, gpu_);
  const DeviceGuard guard(gpu);
  for (int32_t pe = 0; pe < sizes.num_pes; ++pe) {
    heaps_.push_back(std::make_unique<DeviceMemory>(configuration_.heap.bytes));
    memory_.push_back(std::make_unique<PeMemory>(configuration_));
  }
}

void VirtualPes::launch(const Call& call, std::span<const PeBuffers> buffers,
                        cudaStream_t stream) const {
  const DeviceGuard guard(gpu_.ordinal);
  std::vector<std::byte*> heaps;
  std::vector<PePlace> places;
  for (const auto& heap : heaps_) heaps.push_back(heap->data());
  for (const auto& memory : memory_) places.push_back(memory->place());
  cuda::launch(configuration_, call, 0, heaps, places, buffers, stream);
}

void VirtualPes::reset() {
  const DeviceGuard guard(gpu_.ordinal);
  for (const auto& heap : heaps_) heap->zero();
  for (const auto& memory : memory_) memory->reset();
}

Reservation::Reservation(const CallSizes& sizes, int32_t gpu, const Group* group,
                         const Nvshmem* nvshmem)
    : gpu_(gpu_properties(gpu)), configuration_(configure(sizes, gpu_, 1)) {
  load(*configuration_.variant, gpu_);
  const DeviceGuard guard(gpu);
  memory_ = std::make_unique<PeMemory>(configuration_);
  if (group == nullptr) {
    own_heap_ = std::make_unique<DeviceMemory>(configuration_.heap.bytes);
    heaps_.push_back(own_heap_->data());
    return;
  }
  rank_ = group->rank;
  std::byte* const symmetric = nvshmem->allocate(configuration_.heap.bytes);
  for (const int32_t process : group->processes) {
    std::byte* const address = nvshmem->address(symmetric, process);
    if (address == nullptr) {
      throw std::runtime_error("GPU " + std::to_string(gpu) + " of process " +
                               std::to_string(nvshmem->rank()) +
                               " cannot address the memory of process " + std::to_string(process) +
                               "; the PEs of a group must be connected by NVLink or PCIe peer "
                               "access. Use implementation=\"xla\"");
    }
    heaps_.push_back(address);
  }
  reset();
}

void Reservation::launch(const Call& call, const PeBuffers& buffers, cudaStream_t stream) const {
  if (const std::optional<std::string> message = failure()) {
    throw std::runtime_error("an earlier call failed: " + *message +
                             ". Its y is NaN. flashmoe_jax.runtime.reset() makes the symmetric "
                             "heaps anew");
  }
  const DeviceGuard guard(gpu_.ordinal);
  const PePlace place = memory_->place();
  cuda::launch(configuration_, call, rank_, heaps_, {&place, 1}, {&buffers, 1}, stream);
}

std::optional<std::string> Reservation::failure() const {
  const ErrorRecord error = memory_->error();
  if (error.failure == static_cast<uint32_t>(Failure::kNone)) return std::nullopt;
  return describe(error, configuration_.shape);
}

void Reservation::synchronize() const {
  const DeviceGuard guard(gpu_.ordinal);
  check_cuda(cudaDeviceSynchronize(), "waiting for GPU " + std::to_string(gpu_.ordinal));
}

void Reservation::reset() {
  const DeviceGuard guard(gpu_.ordinal);
  check_cuda(cudaMemset(heaps_[rank_], 0, static_cast<size_t>(configuration_.heap.bytes)),
             "zeroing the symmetric heap");
  memory_->reset();
}

Runtime& Runtime::instance() {
  // Never destroyed: at the end of the process the driver may be gone before it.
  static Runtime* const runtime = new Runtime;
  return *runtime;
}

Nvshmem& Runtime::load_nvshmem(const std::string& path) {
  const std::lock_guard lock(mutex_);
  if (nvshmem_ == nullptr) nvshmem_ = std::make_unique<Nvshmem>(path);
  return *nvshmem_;
}

int64_t Runtime::reserve(const CallSizes& sizes, int32_t gpu, const std::optional<Group>& group) {
  const std::lock_guard lock(mutex_);
  if (group.has_value() != (sizes.num_pes > 1)) {
    throw std::invalid_argument("several PEs, and only they, have a group");
  }
  if (group && (nvshmem_ == nullptr || !nvshmem_->started())) {
    throw std::runtime_error("NVSHMEM has not been started");
  }
  auto reservation =
      std::make_unique<Reservation>(sizes, gpu, group ? &*group : nullptr, nvshmem_.get());
  if (group) nvshmem_->barrier();  // Nobody writes into a heap that is not zeroed yet.
  Entry& entry = entries_.emplace_back(Entry{sizes, group.has_value(), {}});
  entry.by_gpu.emplace(gpu, std::move(reservation));
  return static_cast<int64_t>(entries_.size()) - 1;
}

const Reservation& Runtime::find(int64_t id, int32_t gpu) {
  const std::lock_guard lock(mutex_);
  if (id < 0 || id >= static_cast<int64_t>(entries_.size())) {
    throw std::runtime_error(
        "this process has reserved no memory for the call; a program must be "
        "traced in the process that runs it");
  }
  Entry& entry = entries_[id];
  const auto found = entry.by_gpu.find(gpu);
  if (found != entry.by_gpu.end()) return *found->second;
  if (entry.grouped) {
    throw std::runtime_error("the call was traced for another GPU than GPU " + std::to_string(gpu));
  }
  auto reservation = std::make_unique<Reservation>(entry.sizes, gpu, nullptr, nullptr);
  return *entry.by_gpu.emplace(gpu, std::move(reservation)).first->second;
}

std::vector<Reservation*> Runtime::reservations() const {
  const std::lock_guard lock(mutex_);
  std::vector<Reservation*> all;
  for (const Entry& entry : entries_) {
    for (const auto& [gpu, reservation] : entry.by_gpu) all.push_back(reservation.get());
  }
  return all;
}

std::vector<std::string> Runtime::failures() const {
  std::vector<std::string> messages;
  for (const Reservation* reservation : reservations()) {
    reservation->synchronize();
    if (const std::optional<std::string> message = reservation->failure()) {
      messages.push_back(*message);
    }
  }
  return messages;
}

void Runtime::reset() {
  const std::vector<Reservation*> all = reservations();
  for (const Reservation* reservation : all) reservation->synchronize();
  // Not before every peer has ended its launches, and no launch before every heap is zeroed.
  const bool world = nvshmem_ != nullptr && nvshmem_->started();
  if (world) nvshmem_->barrier();
  for (Reservation* reservation : all) reservation->reset();
  if (world) nvshmem_->barrier();
}

int64_t Runtime::reserved_bytes(int32_t gpu) const {
  int64_t bytes = 0;
  for (const Reservation* reservation : reservations()) {
    if (reservation->gpu() == gpu) bytes += reservation->configuration().bytes();
  }
  return bytes;
}

}  // namespace flashmoe::cuda
