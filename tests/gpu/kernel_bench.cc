// How fast the kernel is on this GPU, alone: one PE, random bf16 data, a routing that is uniform on
// average. Prints one JSON line for each shape; median of the repetitions, by events.
//
// usage: kernel_bench [repetitions]
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "kernels/cuda/gpu.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/memory.h"
#include "tests/native/harness.h"

namespace flashmoe::testing {
namespace {

struct BenchShape {
  const char* name;
  int32_t tokens, hidden, intermediate, experts, k;
};

// Bytes of bf16 values in about (-1, 1) times `scale`, a power of two; a block of random ones
// repeated.
void fill(std::byte* target, int64_t values, int scale_exponent, Random& random) {
  const int64_t block = std::min<int64_t>(values, int64_t{1} << 22);
  std::vector<uint16_t> host(static_cast<size_t>(block));
  for (uint16_t& value : host) {
    const uint64_t bits = random.bits();
    const auto exponent = static_cast<uint16_t>(126 + scale_exponent - (bits >> 20 & 1));
    value = static_cast<uint16_t>((bits & 0x807f) | exponent << 7);
  }
  for (int64_t at = 0; at < values; at += block) {
    const int64_t count = std::min(block, values - at);
    cuda::check_cuda(cudaMemcpy(target + 2 * at, host.data(), static_cast<size_t>(2 * count),
                                cudaMemcpyHostToDevice),
                     "filling");
  }
}

void bench(const BenchShape& s, const cuda::Gpu& gpu, int repetitions) {
  const cuda::Configuration configuration = cuda::configure(
      {
          .num_pes = 1,
          .tokens = s.tokens,
          .hidden = s.hidden,
          .intermediate = s.intermediate,
          .num_experts = s.experts,
          .experts_per_token = s.k,
          .capacity = core::kNoCapacity,
          .max_rows = int64_t{s.tokens} * s.k,
          .dtype = core::DType::kBFloat16,
          .exact = true,
      },
      gpu, 1);
  cuda::load(configuration, gpu);
  Random random(1);
  const int64_t matrix = int64_t{s.experts} * s.hidden * s.intermediate;
  const int64_t values = int64_t{s.tokens} * s.hidden;
  const int64_t slots = int64_t{s.tokens} * s.k;
  cuda::DeviceMemory x(2 * values), gate(2 * matrix), up(2 * matrix), down(2 * matrix);
  cuda::DeviceMemory y(2 * values), dropped(4), indices(4 * slots), weights(4 * slots);
  cuda::DeviceMemory heap(configuration.heap.bytes), workspace(configuration.workspace.bytes);
  cuda::MappedError error;
  fill(x.data(), values, 0, random);
  for (cuda::DeviceMemory* part : {&gate, &up, &down}) fill(part->data(), matrix, -5, random);
  std::vector<int32_t> chosen(static_cast<size_t>(slots));
  std::vector<int32_t> all(static_cast<size_t>(s.experts));
  std::iota(all.begin(), all.end(), 0);
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t k = i % s.k;
    std::swap(all[static_cast<size_t>(k)],
              all[static_cast<size_t>(random.between(k, s.experts - 1))]);
    chosen[static_cast<size_t>(i)] = all[static_cast<size_t>(k)];
  }
  const std::vector<float> equal(static_cast<size_t>(slots), 1.0f / static_cast<float>(s.k));
  cuda::check_cuda(cudaMemcpy(indices.data(), chosen.data(), static_cast<size_t>(4 * slots),
                              cudaMemcpyHostToDevice),
                   "routing");
  cuda::check_cuda(cudaMemcpy(weights.data(), equal.data(), static_cast<size_t>(4 * slots),
                              cudaMemcpyHostToDevice),
                   "routing");

  cuda::PeBuffers buffers{};
  buffers.x = x.data();
  buffers.gate = gate.data();
  buffers.up = up.data();
  buffers.down = down.data();
  buffers.indices = reinterpret_cast<int32_t*>(indices.data());
  buffers.weights = reinterpret_cast<float*>(weights.data());
  buffers.y = y.data();
  buffers.dropped = reinterpret_cast<int32_t*>(dropped.data());
  const cuda::Call call{
      .activation = core::Activation::kSilu,
      .tag = 1,
      .deadline = 5,
      .check_weights = false,
      .gate = nullptr,
  };
  std::byte* const heaps[] = {heap.data()};
  const cuda::PePlace places[] = {{workspace.data(), error.device()}};
  const cuda::PeBuffers all_buffers[] = {buffers};
  cudaEvent_t begin, end;
  cuda::check_cuda(cudaEventCreate(&begin), "making an event");
  cuda::check_cuda(cudaEventCreate(&end), "making an event");
  std::vector<float> times;
  for (int i = 0; i < repetitions + 3; ++i) {
    cuda::check_cuda(cudaEventRecord(begin), "timing");
    cuda::launch(configuration, call, 0, heaps, places, all_buffers, nullptr);
    cuda::check_cuda(cudaEventRecord(end), "timing");
    cuda::check_cuda(cudaEventSynchronize(end), "running the kernel");
    float milliseconds = 0;
    cuda::check_cuda(cudaEventElapsedTime(&milliseconds, begin, end), "timing");
    if (i >= 3) times.push_back(milliseconds);
  }
  if (error.read().failure != 0) throw std::runtime_error("the kernel reports a failure");
  std::sort(times.begin(), times.end());
  const double median = times[times.size() / 2];
  const double flops = 6.0 * static_cast<double>(slots) * s.hidden * s.intermediate;
  std::printf(
      "{\"shape\": \"%s\", \"engine\": \"sm%d%d\", \"block_rows\": %d, \"tokens\": %d, "
      "\"hidden\": %d, \"intermediate\": %d, \"experts\": %d, \"experts_per_token\": %d, "
      "\"median_ms\": %.4f, \"min_ms\": %.4f, \"max_ms\": %.4f, \"tflops\": %.1f}\n",
      s.name, gpu.major, gpu.minor, configuration.shape.block_rows, s.tokens, s.hidden,
      s.intermediate, s.experts, s.k, median, static_cast<double>(times.front()),
      static_cast<double>(times.back()), flops / (median * 1e9));
  std::fflush(stdout);
}

}  // namespace
}  // namespace flashmoe::testing

int main(int argc, char** argv) {
  using namespace flashmoe;
  const int repetitions = argc > 1 ? std::atoi(argv[1]) : 20;
  const cuda::Gpu gpu = cuda::gpu_properties(0);
  cuda::Gpu older = gpu;
  older.major = 8;
  older.minor = 0;
  const testing::BenchShape shapes[] = {
      {"Qwen3-30B-A3B", 32768, 2048, 768, 128, 8}, {"Qwen3-30B-A3B", 4096, 2048, 768, 128, 8},
      {"Qwen3-30B-A3B", 64, 2048, 768, 128, 8},    {"OLMoE", 16384, 2048, 1024, 64, 8},
      {"Mixtral-8x7B", 4096, 4096, 14336, 8, 2},   {"SonicMoE-1", 32768, 4096, 1024, 64, 4},
  };
  for (const testing::BenchShape& shape : shapes) testing::bench(shape, gpu, repetitions);
  if (gpu.major == 9) testing::bench(shapes[1], older, repetitions);
  return 0;
}
