// Runs the gate on a GPU, compares it with double precision and times it.
//
// Prints a line for each check and each time; exit status 1 if any failed.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/gate.h"
#include "tests/emulator/gate_reference.h"
#include "tests/emulator/gate_sizes.h"

namespace {

using flashmoe::core::BFloat16;
using flashmoe::core::Float16;
using flashmoe::cuda::GateArguments;
using flashmoe::testing::GateAnswer;
using flashmoe::testing::GateProblem;
using flashmoe::testing::GateSizes;
namespace cuda = flashmoe::cuda;
namespace device = flashmoe::device;

constexpr size_t kSharedBytes = 160 * 1024;

template <typename Element, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) gate_kernel(GateArguments arguments) {
  const int64_t tokens = arguments.tokens;
  const cuda::TokenRange range{
      static_cast<int32_t>(tokens * device::block_index() / device::block_count()),
      static_cast<int32_t>(tokens * (device::block_index() + 1) / device::block_count())};
  cuda::gate<Element, kThreads>(arguments, range, device::shared_memory(), kSharedBytes);
}

// Logits of all tokens for 32 experts in each CTA.
template <typename Element, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) logits_kernel(GateArguments arguments) {
  const int32_t first = device::block_index() * 32;
  cuda::router_logits<Element, kThreads>(
      {arguments.x, arguments.router, arguments.logits, arguments.hidden, arguments.num_experts}, 0,
      arguments.tokens, first,
      first + 32 < arguments.num_experts ? first + 32 : arguments.num_experts,
      device::shared_memory(), kSharedBytes);
}

// Of logits that are there.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1) choose_kernel(GateArguments arguments) {
  const int64_t tokens = arguments.tokens;
  cuda::choose_experts<kThreads>(
      arguments, static_cast<int32_t>(tokens * device::block_index() / device::block_count()),
      static_cast<int32_t>(tokens * (device::block_index() + 1) / device::block_count()),
      device::shared_memory());
}

void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    require(cudaMalloc(&data_, std::max<size_t>(count * sizeof(T), 16)), "cudaMalloc");
    require(cudaMemset(data_, 0xee, count * sizeof(T)), "cudaMemset");
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    require(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice),
            "cudaMemcpy");
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return count_ == 0 ? nullptr : data_; }
  void read(std::vector<T>& values) const {
    require(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost),
            "cudaMemcpy");
  }

 private:
  size_t count_;
  T* data_ = nullptr;
};

class Random {
 public:
  // Mean 0, variance about 1: four uniform numbers, which one draw yields.
  double normal() {
    const uint64_t bits = engine_();
    double sum = 0.0;
    for (int i = 0; i < 4; ++i) sum += static_cast<double>(bits >> 16 * i & 0xffff) - 32767.5;
    return sum * (0.8660254 / 32768.0);
  }
  bool chance(double probability) { return std::bernoulli_distribution(probability)(engine_); }

 private:
  std::mt19937_64 engine_{20240229};
};

template <typename Element>
class OnDevice {
 public:
  explicit OnDevice(const GateProblem& problem)
      : sizes_(problem.sizes),
        x_(problem.elements<Element>()),
        router_(problem.router),
        bias_(problem.bias),
        mask_(problem.mask),
        logits_(size_t(sizes_.tokens) * sizes_.experts),
        indices_(size_t(sizes_.tokens) * sizes_.experts_per_token),
        weights_(size_t(sizes_.tokens) * sizes_.experts_per_token) {}

  GateArguments arguments() const {
    return {x_.data(),
            router_.data(),
            bias_.data(),
            mask_.data(),
            logits_.data(),
            indices_.data(),
            weights_.data(),
            sizes_.tokens,
            sizes_.hidden,
            sizes_.experts,
            sizes_.experts_per_token,
            sizes_.groups,
            sizes_.groups_per_token,
            sizes_.softmax,
            sizes_.renormalize,
            sizes_.scaling_factor};
  }

  template <int kThreads>
  void launch(int ctas) const {
    gate_kernel<Element, kThreads><<<ctas, kThreads, kSharedBytes>>>(arguments());
  }
  template <int kThreads>
  void launch_logits() const {
    logits_kernel<Element, kThreads>
        <<<(sizes_.experts + 31) / 32, kThreads, kSharedBytes>>>(arguments());
  }

  template <int kThreads>
  void launch_choose(int ctas) const {
    choose_kernel<kThreads><<<ctas, kThreads, kSharedBytes>>>(arguments());
  }

  template <int kThreads>
  static void allow_shared_memory() {
    require(cudaFuncSetAttribute(gate_kernel<Element, kThreads>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
            "cudaFuncSetAttribute");
    require(cudaFuncSetAttribute(logits_kernel<Element, kThreads>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
            "cudaFuncSetAttribute");
    require(cudaFuncSetAttribute(choose_kernel<kThreads>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
            "cudaFuncSetAttribute");
  }

  GateAnswer answer() const {
    require(cudaDeviceSynchronize(), "gate");
    GateAnswer result(sizes_);
    logits_.read(result.logits);
    indices_.read(result.indices);
    weights_.read(result.weights);
    return result;
  }
  std::vector<float> logits() const { return answer().logits; }

 private:
  GateSizes sizes_;
  DeviceArray<Element> x_;
  DeviceArray<float> router_;
  DeviceArray<float> bias_;
  DeviceArray<uint8_t> mask_;
  DeviceArray<float> logits_;
  DeviceArray<int32_t> indices_;
  DeviceArray<float> weights_;
};

int failures = 0;

void report(const std::string& name, const std::string& error) {
  std::printf("%s %s%s%s\n", error.empty() ? "passed" : "FAILED", name.c_str(),
              error.empty() ? "" : ": ", error.c_str());
  std::fflush(stdout);
  failures += !error.empty();
}

std::string name_of(const char* element, const GateSizes& sizes) {
  return std::string(element) + " T " + std::to_string(sizes.tokens) + " H " +
         std::to_string(sizes.hidden) + " E " + std::to_string(sizes.experts) + " K " +
         std::to_string(sizes.experts_per_token) + " groups " +
         std::to_string(sizes.groups_per_token) + "/" + std::to_string(sizes.groups);
}

template <typename Element, int kThreads>
void check(const std::string& name, const GateSizes& sizes, Random& random) {
  const GateProblem problem(sizes, sizeof(Element) == 4, random);
  const OnDevice<Element> run(problem);
  run.template launch<kThreads>(3);
  const GateAnswer few = run.answer();
  report(name, flashmoe::testing::gate_error(problem, few));
  const OnDevice<Element> again(problem);
  again.template launch<kThreads>(41);
  report(name + ", the same bits on 41 CTAs", again.answer() == few ? "" : "they differ");
  const OnDevice<Element> split(problem);
  split.template launch_logits<kThreads>();
  report(name + ", the same logits from CTAs with 32 experts each",
         split.logits() == few.logits ? "" : "they differ");
}

void check_not_a_number() {
  Random random;
  const GateSizes sizes{.tokens = 40,
                        .hidden = 64,
                        .experts = 96,
                        .experts_per_token = 6,
                        .groups = 8,
                        .groups_per_token = 3,
                        .bias = true};
  GateProblem problem(sizes, false, random);
  for (size_t i = 0; i < problem.x.size(); i += 50) {
    problem.x[i] = std::numeric_limits<float>::quiet_NaN();
  }
  const OnDevice<BFloat16> run(problem);
  run.launch<512>(2);
  const GateAnswer answer = run.answer();
  const bool inside = std::all_of(answer.indices.begin(), answer.indices.end(),
                                  [&](int32_t e) { return e >= 0 && e < sizes.experts; });
  report("NaN logits choose experts that exist", inside ? "" : "an index is out of range");
}

template <typename Launch>
void time(const std::string& name, const Launch& launch) {
  cudaEvent_t start, stop;
  require(cudaEventCreate(&start), "cudaEventCreate");
  require(cudaEventCreate(&stop), "cudaEventCreate");
  for (int i = 0; i < 3; ++i) launch();
  std::vector<float> milliseconds(20);
  for (float& value : milliseconds) {
    require(cudaEventRecord(start), "cudaEventRecord");
    launch();
    require(cudaEventRecord(stop), "cudaEventRecord");
    require(cudaEventSynchronize(stop), "launch");
    require(cudaEventElapsedTime(&value, start, stop), "cudaEventElapsedTime");
  }
  std::sort(milliseconds.begin(), milliseconds.end());
  std::printf("time %s: %.1f us\n", name.c_str(), 1e3 * milliseconds[milliseconds.size() / 2]);
}

template <typename Element, int kThreads>
void time_sizes(const char* element, const GateSizes& sizes, int ctas) {
  Random random;
  const GateProblem problem(sizes, sizeof(Element) == 4, random);
  const OnDevice<Element> run(problem);
  const std::string name = name_of(element, sizes);
  time(name, [&] { run.template launch<kThreads>(ctas); });
  if (sizes.tokens <= 64) {
    time(name + ", logits only, 32 experts in each CTA",
         [&] { run.template launch_logits<kThreads>(); });
  }
  time(name + ", choice only", [&] { run.template launch_choose<kThreads>(ctas); });
}

}  // namespace

int main() {
  cudaDeviceProp properties;
  require(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  std::printf("%s, %d SMs\n", properties.name, properties.multiProcessorCount);
  OnDevice<BFloat16>::allow_shared_memory<512>();
  OnDevice<BFloat16>::allow_shared_memory<384>();
  OnDevice<Float16>::allow_shared_memory<384>();
  OnDevice<float>::allow_shared_memory<512>();
  OnDevice<float>::allow_shared_memory<384>();

  Random random;
  flashmoe::testing::for_each_gate_test([&](const auto& test) {
    using Test = std::decay_t<decltype(test)>;
    using Element = typename Test::Element;
    constexpr int kThreads = Test::kThreads;
    check<Element, kThreads>(test.name, test.sizes, random);
    // The same with more tokens than the CTAs take at a time, and a depth of many steps.
    GateSizes large = test.sizes;
    large.tokens = 17 * large.tokens + 3;
    large.hidden = 14 * large.hidden + 16;
    check<Element, kThreads>(test.name + ", large", large, random);
  });
  check<BFloat16, 512>("bf16 of a model", {1023, 2048, 128, 8}, random);
  check<BFloat16, 384>("bf16 of a model, 12 warps", {1023, 2048, 128, 8}, random);
  check_not_a_number();

  const int ctas = properties.multiProcessorCount;
  time_sizes<BFloat16, 512>("bf16", {32768, 2048, 128, 8}, ctas);
  time_sizes<BFloat16, 384>("bf16", {32768, 2048, 128, 8}, ctas);
  time_sizes<float, 512>("fp32", {32768, 2048, 128, 8}, ctas);
  time_sizes<BFloat16, 512>("bf16", {32768, 2048, 256, 8}, ctas);
  time_sizes<BFloat16, 512>("bf16",
                            {.tokens = 32768,
                             .hidden = 2048,
                             .experts = 256,
                             .experts_per_token = 8,
                             .groups = 8,
                             .groups_per_token = 4,
                             .softmax = false,
                             .bias = true},
                            ctas);
  time_sizes<BFloat16, 512>("bf16", {8192, 2048, 512, 8}, ctas);
  time_sizes<BFloat16, 512>("bf16", {64, 2048, 256, 8}, ctas);
  time_sizes<BFloat16, 512>("bf16", {64, 2048, 128, 8}, ctas);
  return failures > 0 ? 1 : 0;
}
