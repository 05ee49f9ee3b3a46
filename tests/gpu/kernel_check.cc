// The kernel on a real GPU, without Python and JAX: the PEs of a layer as virtual PEs of one GPU,
// both tile engines, against the double-precision reference of the native tests.
//
// usage: kernel_check [--seed=N] [--epochs=N] [--deadline=SECONDS] [part of a case's name ...]
//
// Cases whose names contain all the parts run, by default 3 epochs each. Prints a line for each;
// exit status 1 if any failed.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <future>
#include <memory>
#include <semaphore>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/cuda/failure.h"
#include "kernels/cuda/gpu.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/memory.h"
#include "tests/emulator/kernel_layer.h"
#include "tests/emulator/kernel_suite.h"
#include "tests/native/harness.h"
#include "tests/native/problem.h"
#include "tests/native/reference.h"

namespace flashmoe::testing {
namespace {

using core::Activation;
using core::DType;

// A copy of host memory on the GPU.
class OnGpu {
 public:
  OnGpu(const void* host, int64_t bytes) : bytes_(bytes), memory_(bytes > 0 ? bytes : 1) {
    if (host != nullptr) {
      cuda::check_cuda(cudaMemcpy(memory_.data(), host, bytes, cudaMemcpyHostToDevice), "copying");
    }
  }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(memory_.data());
  }
  void read(void* host) const {
    cuda::check_cuda(cudaMemcpy(host, memory_.data(), bytes_, cudaMemcpyDeviceToHost), "reading");
  }
  // So that an element that the kernel does not write is seen.
  void fill_with_nan() { cuda::check_cuda(cudaMemset(memory_.data(), 0xff, bytes_), "filling"); }

 private:
  int64_t bytes_;
  cuda::DeviceMemory memory_;
};

int64_t bytes_of(const Tensor& tensor) {
  return tensor.size() * (tensor.dtype() == DType::kFloat32 ? 4 : 2);
}

struct PeOnGpu {
  OnGpu x, indices, weights, gate, up, down, gate_bias, up_bias, down_bias, y, dropped;
  OnGpu router, selection_bias, mask, logits;  // where the kernel routes
  cuda::DeviceMemory heap, workspace;
  cuda::MappedError error;

  static OnGpu copy(const Tensor& tensor) { return {tensor.data(), bytes_of(tensor)}; }

  template <typename T>
  static OnGpu copy(const std::vector<T>& values) {
    return {values.data(), static_cast<int64_t>(values.size() * sizeof(T))};
  }

  PeOnGpu(const Pe& pe, const cuda::Configuration& configuration, const GateProblem* routed)
      : x(copy(pe.x)),
        indices(copy(pe.indices)),
        weights(copy(pe.weights)),
        gate(copy(pe.experts.gate)),
        up(copy(pe.experts.up)),
        down(copy(pe.experts.down)),
        gate_bias(copy(pe.experts.gate_bias)),
        up_bias(copy(pe.experts.up_bias)),
        down_bias(copy(pe.experts.down_bias)),
        y(nullptr, bytes_of(pe.y)),
        dropped(nullptr, 4),
        router(copy(routed == nullptr ? std::vector<float>{} : routed->router)),
        selection_bias(copy(routed == nullptr ? std::vector<float>{} : routed->bias)),
        mask(copy(routed == nullptr ? std::vector<uint8_t>{} : routed->mask)),
        logits(nullptr, routed == nullptr ? 0
                                          : int64_t{configuration.shape.tokens} *
                                                configuration.shape.num_experts * 4),
        heap(configuration.heap.bytes),
        workspace(configuration.workspace.bytes) {}

  cuda::PeBuffers buffers(const Layer& layer, const GateProblem* routed) const {
    cuda::PeBuffers b{};
    b.x = x.as<void>();
    b.indices = indices.as<int32_t>();
    b.weights = weights.as<float>();
    b.gate = layer.gated ? gate.as<void>() : nullptr;
    b.up = up.as<void>();
    b.down = down.as<void>();
    b.gate_bias = layer.gated && layer.biased ? gate_bias.as<void>() : nullptr;
    b.up_bias = layer.biased ? up_bias.as<void>() : nullptr;
    b.down_bias = layer.biased ? down_bias.as<void>() : nullptr;
    b.y = y.as<void>();
    b.dropped = dropped.as<int32_t>();
    if (routed == nullptr) return b;
    b.router = router.as<float>();
    if (!routed->bias.empty()) b.selection_bias = selection_bias.as<float>();
    if (!routed->mask.empty()) b.mask = mask.as<uint8_t>();
    b.logits = logits.as<float>();
    return b;
  }
};

// All PEs of a problem on this GPU.
class Run {
 public:
  // With gates, of all PEs, the kernel routes.
  Run(Problem& problem, const cuda::Gpu& gpu, const std::vector<GateProblem>& gates = {})
      : problem_(problem), gates_(gates), configuration_(configure(problem.layer, gpu)) {
    cuda::load(configuration_, gpu);
    for (size_t i = 0; i < problem.pes.size(); ++i) {
      pes_.push_back(std::make_unique<PeOnGpu>(problem.pes[i], configuration_, routed(i)));
    }
  }

  const cuda::Configuration& configuration() const { return configuration_; }

  static cuda::Configuration configure(const Layer& layer, const cuda::Gpu& gpu) {
    return cuda::configure(sizes_of(layer), gpu, layer.shape.num_pes);
  }

  // As if so many epochs had been executed.
  void set_epoch(uint32_t epoch) {
    for (auto& pe : pes_) {
      std::byte* const control = pe->workspace.data() + configuration_.workspace.control.offset +
                                 offsetof(cuda::Control, epoch);
      cuda::check_cuda(cudaMemcpy(control, &epoch, sizeof epoch, cudaMemcpyHostToDevice),
                       "setting the epoch");
    }
  }

  // One epoch; results go to the problem. `absent` is a PE that never enters, or -1. Returns what
  // the PEs report, one text for each that failed.
  std::vector<std::string> epoch(double deadline, int32_t absent = -1) {
    std::vector<std::byte*> heaps;
    std::vector<cuda::PePlace> places;
    std::vector<cuda::PeBuffers> buffers;
    for (size_t i = 0; i < pes_.size(); ++i) {
      PeOnGpu& pe = *pes_[i];
      pe.y.fill_with_nan();
      pe.dropped.fill_with_nan();
      heaps.push_back(pe.heap.data());
      places.push_back({pe.workspace.data(), pe.error.device()});
      buffers.push_back(pe.buffers(problem_.layer, routed(i)));
    }
    if (absent >= 0) buffers[static_cast<size_t>(absent)].absent = true;
    cuda::Gate gate{};
    if (!gates_.empty()) gate = gate_of(gates_.front().sizes);
    const cuda::Call call{
        .activation = problem_.layer.activation,
        .tag = problem_.tag,
        .deadline = deadline,
        .check_weights = true,
        .gate = gates_.empty() ? nullptr : &gate,
    };
    cuda::launch(configuration_, call, 0, heaps, places, buffers, nullptr);
    cuda::check_cuda(cudaDeviceSynchronize(), "running the kernel");
    std::vector<std::string> failures;
    for (size_t i = 0; i < pes_.size(); ++i) {
      pes_[i]->y.read(problem_.pes[i].y.data());
      pes_[i]->dropped.read(problem_.pes[i].dropped.data());
      const cuda::ErrorRecord error = pes_[i]->error.read();
      if (error.failure != 0) failures.push_back(cuda::describe(error, configuration_.shape));
      if (!gates_.empty()) read_routing(i);
    }
    return failures;
  }

 private:
  const GateProblem* routed(size_t pe) const { return gates_.empty() ? nullptr : &gates_[pe]; }

  // Into the problem, whose y then follows from it.
  void read_routing(size_t pe) {
    GateAnswer answer(gates_[pe].sizes);
    pes_[pe]->logits.read(answer.logits.data());
    pes_[pe]->indices.read(answer.indices.data());
    pes_[pe]->weights.read(answer.weights.data());
    const std::string error = gate_error(gates_[pe], answer);
    check(error.empty(), "gate of PE " + std::to_string(pe) + ": " + error);
    problem_.pes[pe].indices = answer.indices;
    std::copy(answer.weights.begin(), answer.weights.end(),
              static_cast<float*>(problem_.pes[pe].weights.data()));
  }

  Problem& problem_;
  const std::vector<GateProblem> gates_;
  cuda::Configuration configuration_;
  std::vector<std::unique_ptr<PeOnGpu>> pes_;
};

Layer layer(int32_t pes, int32_t tokens, int32_t hidden, int32_t intermediate, int32_t experts,
            int32_t k, DType dtype, bool gated, bool biased, Activation activation) {
  return kernel_layer({pes, tokens, hidden, intermediate, experts, k}, dtype, gated, biased,
                      activation);
}

// The suite of the emulator, and larger layers.
std::vector<SuiteCase> gpu_cases() {
  std::vector<SuiteCase> cases;
  const auto add = [&](const std::string& name, const Layer& l, Routing routing) {
    cases.push_back({name, l, routing});
  };
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    const std::string type = dtype == DType::kBFloat16  ? "bf16"
                             : dtype == DType::kFloat16 ? "f16"
                                                        : "f32";
    for (const SuiteCase& test : kernel_suite(dtype)) {
      add(type + " " + test.name, test.layer, test.routing);
    }
    for (const int32_t pes : {1, 2, 4, 8}) {
      const std::string name = type + " P=" + std::to_string(pes);
      add(name + " small blocks",
          layer(pes, 37, 200, 72, 8, 3, dtype, true, true, Activation::kSilu), Routing::kDistinct);
      add(name + " large blocks",
          layer(pes, 301, 136, 328, 8, 2, dtype, true, false, Activation::kSilu), Routing::kSkewed);
      add(name + " ungated", layer(pes, 130, 264, 264, 8, 2, dtype, false, true, Activation::kGelu),
          Routing::kRepeating);
    }
    // For racecheck, which cannot follow a stage that is used again (docs/kernel.md): no deeper
    // than four stages of 128 bytes, and fewer tiles than CTAs.
    const int32_t piece = dtype == DType::kFloat32 ? 4 : 8;  // elements of 16 bytes
    add(type + " P=2 each stage once",
        layer(2, 37, 25 * piece, 9 * piece, 8, 3, dtype, true, true, Activation::kSilu),
        Routing::kDistinct);
    add(type + " large, one expert",
        layer(4, 99, 64, 128, 8, 1, dtype, true, false, Activation::kRelu2), Routing::kAllToOne);
    add(type + " large, PEs without rows",
        layer(4, 65, 64, 64, 16, 4, dtype, true, false, Activation::kRelu),
        Routing::kSomePesMasked);
    add(type + " large, no row at all",
        layer(2, 65, 64, 64, 16, 4, dtype, true, false, Activation::kRelu), Routing::kAllMasked);
    add(type + " large, 512 experts",
        layer(4, 40, 32, 40, 512, 16, dtype, true, false, Activation::kSilu), Routing::kDistinct);
    Layer capacity = layer(4, 90, 96, 64, 16, 2, dtype, true, false, Activation::kSilu);
    capacity.shape.capacity = 17;
    add(type + " large, capacity", capacity, Routing::kSkewed);
    Layer bounded = layer(4, 90, 96, 64, 16, 2, dtype, true, false, Activation::kSilu);
    bounded.shape.max_rows = 101;
    add(type + " large, bounded memory", bounded, Routing::kSkewed);
  }
  return cases;
}

// What the command line asks for.
struct Options {
  uint64_t seed = 1;
  int epochs = 3;
  double deadline = 20;
  std::vector<std::string> filters;
};

// A case's input, and what the reference makes of it.
struct Prepared {
  Problem problem;
  std::vector<Expected> expected;

  Prepared(const SuiteCase& test, uint64_t seed)
      : problem(test.layer, test.routing, seed), expected(expect(problem)) {}
};

// Prepares a case in a thread of its own, on as many cores as there are: the reference takes
// seconds for what the GPU does in less than a millisecond.
std::future<std::unique_ptr<Prepared>> prepare(const SuiteCase& test, uint64_t seed) {
  static std::counting_semaphore<> cores(std::max(1u, std::thread::hardware_concurrency()));
  return std::async(std::launch::async, [test, seed] {
    cores.acquire();
    auto prepared = std::make_unique<Prepared>(test, seed);
    cores.release();
    return prepared;
  });
}

// Results within their bounds, and the same bits in all epochs. `expected` is asked after the
// first.
void check_epochs(Run& run, const Problem& problem, const Options& options,
                  const std::function<std::vector<Expected>()>& expected) {
  std::vector<std::byte> first;
  for (int i = 0; i < options.epochs; ++i) {
    const std::vector<std::string> failures = run.epoch(options.deadline);
    check(failures.empty(), failures.empty() ? "" : failures.front());
    const std::vector<std::byte> bytes = problem.result_bytes(false);
    if (i == 0) {
      check_forward(problem, expected());
      first = bytes;
    }
    check(bytes == first, "epoch " + std::to_string(i) + " has other bits than epoch 0");
  }
}

void run_case(Prepared& prepared, const cuda::Gpu& gpu, const Options& options,
              uint32_t epochs_before = 0) {
  Run run(prepared.problem, gpu);
  run.set_epoch(epochs_before);
  check_epochs(run, prepared.problem, options, [&] { return prepared.expected; });
}

// The kernel routes by itself.
void run_gated(const cuda::Gpu& gpu, int32_t pes, const Options& options) {
  const GateSizes sizes{.tokens = 61,
                        .hidden = 200,
                        .experts = 64,
                        .experts_per_token = 6,
                        .groups = 8,
                        .groups_per_token = 4,
                        .softmax = false,
                        .bias = true,
                        .mask = true,
                        .scaling_factor = 2.5f};
  Random random(options.seed);
  GatedProblem gated(
      layer(pes, sizes.tokens, sizes.hidden, 72, sizes.experts, sizes.experts_per_token,
            DType::kBFloat16, true, false, Activation::kSilu),
      sizes, options.seed, random);
  Run run(gated.problem, gpu, gated.gates);
  check_epochs(run, gated.problem, options, [&] { return expect(gated.problem); });
}

// A PE that never enters: the others end with an error that names it, and with NaN.
void run_absent(const cuda::Gpu& gpu, uint64_t seed) {
  Problem problem(layer(4, 64, 64, 64, 8, 2, DType::kBFloat16, true, false, Activation::kSilu),
                  Routing::kDistinct, seed);
  Run run(problem, gpu);
  const std::vector<std::string> failures = run.epoch(0.2, 2);
  check(failures.size() == 3, std::to_string(failures.size()) + " PEs of 3 report a failure");
  for (const std::string& failure : failures) check_contains(failure, {"no counts from PE 2"});
  for (const size_t pe : {0, 1, 3}) {
    for (int64_t i = 0; i < problem.pes[pe].y.size(); ++i) {
      const double y = problem.pes[pe].y.get(i);
      check(y != y, "y of a PE that failed is not NaN");
    }
  }
  std::printf("    it says: %s\n", failures.front().c_str());
}

// The count of epochs overflows, and with it its parity goes on.
void run_overflow(const cuda::Gpu& gpu, Options options) {
  options.epochs = 8;
  const SuiteCase test{"",
                       layer(4, 64, 64, 64, 8, 2, DType::kBFloat16, true, false, Activation::kSilu),
                       Routing::kSkewed};
  Prepared prepared(test, options.seed);
  run_case(prepared, gpu, options, UINT32_MAX - 4);
}

int run_all(const Options& options) {
  int passed = 0, failed = 0;
  const cuda::Gpu real = cuda::gpu_properties(0);
  std::vector<cuda::Gpu> gpus{real};
  if (real.major == 9) {  // the engine of older GPUs runs here too
    cuda::Gpu older = real;
    older.major = 8;
    older.minor = 0;
    gpus.push_back(older);
  }
  const auto wanted = [&](const std::string& name) {
    return std::all_of(options.filters.begin(), options.filters.end(),
                       [&](const auto& filter) { return name.find(filter) != std::string::npos; });
  };
  const auto attempt = [&](const std::string& name, const auto& f) {
    if (!wanted(name)) return;
    const auto begin = std::chrono::steady_clock::now();
    std::string error;
    try {
      f();
    } catch (const std::exception& exception) {
      error = exception.what();
    }
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
    ++(error.empty() ? passed : failed);
    std::printf("%s %6.2f s  %s%s%s\n", error.empty() ? "passed" : "FAILED", time.count(),
                name.c_str(), error.empty() ? "" : ": ", error.c_str());
    std::fflush(stdout);
  };
  for (const cuda::Gpu& gpu : gpus) {
    const std::string engine = "sm" + std::to_string(gpu.major) + std::to_string(gpu.minor) + " ";
    std::vector<std::pair<std::string, std::future<std::unique_ptr<Prepared>>>> cases;
    for (const SuiteCase& test : gpu_cases()) {
      if (gpu.major == 9 && test.layer.dtype == DType::kFloat32) continue;  // same kernel as sm80
      const std::string name = engine + test.name;
      if (wanted(name)) cases.emplace_back(name, prepare(test, options.seed));
    }
    for (auto& [name, prepared] : cases) {
      attempt(name, [&] { run_case(*prepared.get(), gpu, options); });
    }
    for (const int32_t pes : {1, 2, 4, 8}) {
      attempt(engine + "bf16 P=" + std::to_string(pes) + " gate inside",
              [&] { run_gated(gpu, pes, options); });
    }
    attempt(engine + "a PE never enters", [&] { run_absent(gpu, options.seed); });
    attempt(engine + "the count of epochs overflows", [&] { run_overflow(gpu, options); });
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace
}  // namespace flashmoe::testing

int main(int argc, char** argv) {
  flashmoe::testing::Options options;
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "--seed=", 7) == 0) {
      options.seed = std::strtoull(argv[i] + 7, nullptr, 10);
    } else if (std::strncmp(argv[i], "--epochs=", 9) == 0) {
      options.epochs = std::atoi(argv[i] + 9);
    } else if (std::strncmp(argv[i], "--deadline=", 11) == 0) {
      options.deadline = std::atof(argv[i] + 11);
    } else {
      options.filters.emplace_back(argv[i]);
    }
  }
  return flashmoe::testing::run_all(options);
}
