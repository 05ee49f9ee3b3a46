// The whole kernel on the emulator: all PEs of a problem, over several epochs, as a GPU or several
// would run them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/failure.h"
#include "kernels/cuda/kernel.h"
#include "kernels/cuda/kernel_arguments.h"
#include "kernels/cuda/network_transport.h"
#include "kernels/cuda/variant_of.h"
#include "kernels/emulator/emulator.h"
#include "tests/emulator/gate_reference.h"
#include "tests/emulator/kernel_layer.h"
#include "tests/native/harness.h"
#include "tests/native/problem.h"

namespace flashmoe::testing {

inline device::TensorMap encode_for_emulator(const cuda::TiledTensor& tensor) {
  const uint32_t element = tensor.dtype == core::DType::kFloat32 ? 4 : 2;
  const auto columns = static_cast<uint64_t>(tensor.columns),
             rows = static_cast<uint64_t>(tensor.rows);
  return device::TensorMap::from(
      emulator::TensorMap{.base = tensor.data,
                          .element_bytes = element,
                          .size = {columns, rows, static_cast<uint64_t>(tensor.planes)},
                          .stride = {columns * element, columns * rows * element},
                          .box = {static_cast<uint32_t>(tensor.box_columns),
                                  static_cast<uint32_t>(tensor.box_rows), 1}});
}

// The symmetric heaps and workspaces of all PEs, for as many epochs as one likes.
class EmulatedPes {
 public:
  explicit EmulatedPes(const cuda::Configuration& configuration) : configuration_(configuration) {
    for (int32_t pe = 0; pe < configuration.shape.num_pes; ++pe) {
      const std::string of = " of PE " + std::to_string(pe);
      heaps_.emplace_back(static_cast<size_t>(configuration.heap_bytes()), "heap" + of);
      workspaces_.emplace_back(static_cast<size_t>(configuration.workspace.bytes),
                               "workspace" + of);
      errors_.emplace_back(sizeof(cuda::ErrorRecord), "error record" + of);
      errors_.back().fill(std::byte{0});
      // Control words and signals are zeros at first. Copies take whole blocks of rows, also those
      // that nobody has written; these are NaN, and must not matter.
      const core::HeapLayout& heap = configuration.heap;
      const cuda::WorkspaceLayout& workspace = configuration.workspace;
      const cuda::NetworkLayout& network = configuration.network;
      for (const core::Section& section :
           {heap.counted, heap.arrived, heap.came_back, network.arrived, network.came_back,
            network.second_done}) {
        write(heaps_.back(), section, std::byte{0});
      }
      for (const core::Section& section : {workspace.control, workspace.first_done}) {
        write(workspaces_.back(), section, std::byte{0});
      }
      write(heaps_.back(), heap.recv, std::byte{0xff});
      write(workspaces_.back(), workspace.activated, std::byte{0xff});
    }
  }

  const std::vector<emulator::GlobalMemory>& heap_memory() const { return heaps_; }
  std::vector<std::byte*> heaps() const {
    std::vector<std::byte*> all;
    for (const auto& heap : heaps_) all.push_back(heap.data());
    return all;
  }
  std::vector<cuda::PePlace> places() const {
    std::vector<cuda::PePlace> all;
    for (size_t pe = 0; pe < heaps_.size(); ++pe) {
      all.push_back({workspaces_[pe].data(), errors_[pe].as<cuda::ErrorRecord>()});
    }
    return all;
  }
  // What the PEs that failed say, by PE; "" for the others.
  std::vector<std::string> failures() const {
    std::vector<std::string> all;
    for (const auto& error : errors_) {
      const auto* record = error.as<cuda::ErrorRecord>();
      all.push_back(record->failure == 0 ? "" : cuda::describe(*record, configuration_.shape));
    }
    return all;
  }

 private:
  static void write(emulator::GlobalMemory& memory, const core::Section& section, std::byte value) {
    const std::vector<std::byte> bytes(static_cast<size_t>(section.bytes()), value);
    memory.write(static_cast<size_t>(section.offset), bytes.data(), bytes.size());
  }

  const cuda::Configuration& configuration_;
  std::vector<emulator::GlobalMemory> heaps_, workspaces_, errors_;
};

// What all PEs are given in one epoch, and what they answer, as memory of the emulator.
class EmulatedCall {
 public:
  // The PEs' gates, if the kernel is to route.
  EmulatedCall(const Problem& problem, const std::vector<GateProblem>& gates) {
    const core::Shape& shape = problem.layer.shape;
    for (size_t index = 0; index < problem.pes.size(); ++index) {
      const Pe& pe = problem.pes[index];
      const std::string of = " of PE " + std::to_string(index);
      const auto constant = [&](const char* name, const Tensor& tensor) -> std::byte* {
        if (tensor.is_absent()) return nullptr;
        return constant_copy(name + of, tensor.data(), tensor.bytes().size());
      };
      cuda::PeBuffers b{};
      b.x = constant("x", pe.x);
      b.gate = constant("gate", pe.experts.gate);
      b.up = constant("up", pe.experts.up);
      b.down = constant("down", pe.experts.down);
      b.gate_bias = constant("gate_bias", pe.experts.gate_bias);
      b.up_bias = constant("up_bias", pe.experts.up_bias);
      b.down_bias = constant("down_bias", pe.experts.down_bias);
      const size_t slots = pe.indices.size();
      if (gates.empty()) {
        b.indices = constant_of("indices" + of, pe.indices);
        b.weights = reinterpret_cast<float*>(constant("weights", pe.weights));
      } else {
        const GateProblem& gate = gates[index];
        b.router = constant_of("router" + of, gate.router);
        if (!gate.bias.empty()) b.selection_bias = constant_of("selection_bias" + of, gate.bias);
        if (!gate.mask.empty()) b.mask = constant_of("mask" + of, gate.mask);
        b.logits = result<float>("logits" + of, static_cast<size_t>(shape.tokens) *
                                                    static_cast<size_t>(shape.num_experts));
        b.indices = result<int32_t>("indices" + of, slots);
        b.weights = result<float>("weights" + of, slots);
      }
      b.y = result<std::byte>("y" + of, pe.y.bytes().size());
      b.dropped = result<int32_t>("dropped" + of, 1);
      buffers_.push_back(b);
    }
  }

  std::vector<cuda::PeBuffers>& buffers() { return buffers_; }

  // Copies the results into the problem.
  void read(Problem& problem) const {
    for (size_t index = 0; index < problem.pes.size(); ++index) {
      Pe& pe = problem.pes[index];
      const cuda::PeBuffers& b = buffers_[index];
      std::memcpy(pe.y.data(), b.y, pe.y.bytes().size());
      pe.dropped[0] = *b.dropped;
      std::copy_n(b.indices, pe.indices.size(), pe.indices.begin());
      std::copy_n(b.weights, pe.indices.size(), static_cast<float*>(pe.weights.data()));
    }
  }
  GateAnswer gate_answer(size_t pe, const GateSizes& sizes) const {
    GateAnswer answer(sizes);
    const cuda::PeBuffers& b = buffers_[pe];
    std::copy_n(b.logits, answer.logits.size(), answer.logits.begin());
    std::copy_n(b.indices, answer.indices.size(), answer.indices.begin());
    std::copy_n(b.weights, answer.weights.size(), answer.weights.begin());
    return answer;
  }

 private:
  std::byte* constant_copy(std::string name, const void* data, size_t bytes) {
    memory_.emplace_back(bytes, std::move(name), emulator::GlobalMemory::Use::kConstant);
    memory_.back().write(0, data, bytes);
    return memory_.back().data();
  }
  template <typename T>
  T* constant_of(std::string name, const std::vector<T>& values) {
    return reinterpret_cast<T*>(
        constant_copy(std::move(name), values.data(), values.size() * sizeof(T)));
  }
  template <typename T>
  T* result(std::string name, size_t count) {
    memory_.emplace_back(count * sizeof(T), std::move(name));
    return memory_.back().as<T>();
  }

  std::vector<emulator::GlobalMemory> memory_;
  std::vector<cuda::PeBuffers> buffers_;
};

struct KernelTrial {
  int32_t ctas = 2;      // of each PE
  bool one_gpu = false;  // that all PEs are on; else each has its own
  double deadline = 10;  // seconds, of virtual time
  // The kernel routes, with a gate of the same sizes on all PEs; by epoch and PE.
  std::vector<std::vector<GateProblem>> gates{};
  // With NetworkTransport: whether PE `pe` stores to PE `other` itself. Null: to none but itself.
  std::function<bool(int32_t pe, int32_t other)> reaches{};
  // Changes what the CTAs of a PE that has its own GPU are given. For faults.
  std::function<void(cuda::KernelArguments&, size_t epoch, int32_t pe)> edit{};
};

// What is wrong with what the gate of a PE that failed answers; empty if nothing.
inline std::string poison_error(const GateAnswer& answer) {
  const auto is_nan = [](float value) { return std::isnan(value); };
  if (!std::ranges::all_of(answer.logits, is_nan)) return "a logit is not NaN";
  if (!std::ranges::all_of(answer.weights, is_nan)) return "a weight is not NaN";
  if (std::ranges::any_of(answer.indices, [](int32_t expert) { return expert != -1; })) {
    return "a token has an expert";
  }
  return {};
}

struct KernelResult {
  std::vector<std::string> failures;  // what each PE says; "" if it did not fail
  uint64_t nanoseconds;               // virtual
};

// Runs the problems, which are calls of one layer, one after the other, and writes their results
// into them. PEs on different GPUs may be in different epochs. Throws emulator::Failure, and
// CheckFailed if a gate's answer is wrong.
template <typename Engine, typename Transport>
KernelResult run_kernel_on_emulator(std::vector<Problem>& problems, uint64_t seed,
                                    const KernelTrial& trial) {
  const Layer& layer = problems.front().layer;
  const int32_t pes = layer.shape.num_pes;
  const cuda::KernelVariant variant = cuda::variant_of<Engine>(Transport::kNetwork, nullptr);
  const cuda::Configuration configuration = cuda::configure(sizes_of(layer), variant, trial.ctas);
  const EmulatedPes memory(configuration);
  std::vector<int32_t> processes(static_cast<size_t>(pes));
  std::iota(processes.begin(), processes.end(), 0);
  std::deque<EmulatedCall> calls;
  // By epoch and GPU. On GPUs of their own, PEs are launched as processes launch them.
  std::vector<std::vector<cuda::KernelArguments>> arguments;
  for (size_t epoch = 0; epoch < problems.size(); ++epoch) {
    const Problem& problem = problems[epoch];
    const bool routes = !trial.gates.empty();
    calls.emplace_back(problem, routes ? trial.gates[epoch] : std::vector<GateProblem>{});
    cuda::Gate gate{};
    if (routes) gate = gate_of(trial.gates[epoch].front().sizes);
    const cuda::Call call{
        .activation = layer.activation,
        .tag = problem.tag,
        .deadline = trial.deadline,
        .check_weights = problem.check_weights,
        .gate = routes ? &gate : nullptr,
    };
    const std::vector<cuda::PePlace> places = memory.places();
    const std::vector<cuda::PeBuffers>& buffers = calls.back().buffers();
    const size_t pes_of_gpu = trial.one_gpu ? places.size() : 1;
    arguments.emplace_back();
    for (size_t first = 0; first < places.size(); first += pes_of_gpu) {
      const auto pe = static_cast<int32_t>(first);
      arguments.back().push_back(cuda::kernel_arguments(
          configuration, call, pe, memory.heaps(), std::span(places).subspan(first, pes_of_gpu),
          std::span(buffers).subspan(first, pes_of_gpu), &encode_for_emulator, processes));
      cuda::KernelArguments& of_gpu = arguments.back().back();
      for (int32_t other = 0; other < pes && Transport::kNetwork; ++other) {
        if (other == pe || (trial.reaches && trial.reaches(pe, other))) continue;
        of_gpu.heaps[other] = nullptr;
      }
      if (trial.edit) trial.edit(of_gpu, epoch, pe);
    }
  }
  emulator::Launch launch{.blocks = trial.ctas * pes,
                          .threads = Engine::kThreads,
                          .shared_bytes = sizeof(cuda::KernelShared<Engine>),
                          .seed = seed,
                          .grid_per_gpu = !trial.one_gpu};
  if (!trial.one_gpu) {
    for (int32_t block = 0; block < launch.blocks; ++block) {
      launch.gpu_of_block.push_back(block / trial.ctas);
    }
  }
  for (const emulator::GlobalMemory& heap : memory.heap_memory()) {
    if (Transport::kNetwork) launch.symmetric.push_back(&heap);
  }
  const emulator::Outcome outcome = emulator::launch(launch, [&] {
    const auto gpu = static_cast<size_t>(emulator::gpu_index());
    for (size_t epoch = 0; epoch < arguments.size(); ++epoch) {
      if (epoch > 0) emulator::next_kernel();
      cuda::run_kernel<Engine, Transport>(arguments[epoch][gpu]);
    }
  });
  const std::vector<std::string> failures = memory.failures();
  for (size_t epoch = 0; epoch < problems.size(); ++epoch) {
    calls[epoch].read(problems[epoch]);
    if (trial.gates.empty()) continue;
    for (size_t pe = 0; pe < static_cast<size_t>(pes); ++pe) {
      const GateProblem& gate = trial.gates[epoch][pe];
      if (!trial.one_gpu && arguments[epoch][pe].pes[0].absent) continue;
      const GateAnswer answer = calls[epoch].gate_answer(pe, gate.sizes);
      const std::string error =
          failures[pe].empty() ? gate_error(gate, answer) : poison_error(answer);
      check(error.empty(), "gate of PE " + std::to_string(pe) + ": " + error);
    }
  }
  return {failures, outcome.nanoseconds};
}

}  // namespace flashmoe::testing
