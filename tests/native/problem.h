// A layer, its routing and its data on every PE: what the engine is given, and where its results
// go.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cpu/call.h"
#include "tests/native/harness.h"

namespace flashmoe::testing {

// An array of exactly `size` elements, so that AddressSanitizer sees who reads or writes past it. A
// default one is absent, as the bias of a layer without biases.
class Tensor {
 public:
  Tensor() = default;
  Tensor(cpu::DType dtype, int64_t size);

  cpu::DType dtype() const { return dtype_; }
  int64_t size() const { return size_; }
  bool is_absent() const { return data_ == nullptr; }
  void* data() const { return data_.get(); }
  double get(int64_t i) const;
  void set(int64_t i, double value);
  // Makes every element a NaN, so that one that nobody writes is seen.
  void clear();
  std::vector<std::byte> bytes() const;

 private:
  int64_t element_bytes() const { return dtype_ == cpu::DType::kFloat32 ? 4 : 2; }

  cpu::DType dtype_ = cpu::DType::kFloat32;
  int64_t size_ = 0;
  std::unique_ptr<std::byte[]> data_;
};

// The parameters of local experts, or their gradients; laid out as cpu::ExpertWeights.
struct Experts {
  Tensor gate, up, down, gate_bias, up_bias, down_bias;
};

struct Pe {
  // Given.
  Tensor x;                      // [T, H]
  std::vector<int32_t> indices;  // [T, K]
  Tensor weights;                // float [T, K]
  Experts experts;
  Tensor dy;  // [T, H]
  // Results.
  Tensor y;                       // [T, H]
  std::vector<int32_t> dropped;   // [1]
  Tensor rows, pre_gate, pre_up;  // [R, H], [R, D], [R, D]
  Tensor dx;                      // [T, H]
  Tensor d_weights;               // float [T, K]
  Experts d_experts;

  std::vector<const Tensor*> forward_results() const { return {&y}; }
  std::vector<const Tensor*> backward_results() const;
};

struct Layer {
  core::Shape shape;
  cpu::DType dtype;
  cpu::Activation activation;
  bool gated;
  bool biased;
  bool save_rows;
  bool save_preactivations;
  // Relative, of the factors of the experts' products as they are multiplied.
  double factor_error = 0;
};

// Which expert the slots of a problem choose.
enum class Routing { kDistinct, kRepeating, kSkewed, kAllToOne, kSomePesMasked, kAllMasked };

struct Problem {
  // Random data, scaled so that results and gradients are of order 1.
  Problem(const Layer& layer, Routing routing, uint64_t seed);

  cpu::CallConfig config(bool backward) const;
  cpu::ForwardBuffers forward_buffers(int32_t pe) const;
  cpu::BackwardBuffers backward_buffers(int32_t pe) const;
  void clear_results();
  std::string description() const;
  // The bits of the results of all PEs.
  std::vector<std::byte> result_bytes(bool backward) const;

  Layer layer;
  uint64_t seed;
  uint32_t tag = 1;
  std::chrono::nanoseconds deadline = std::chrono::minutes(2);
  bool check_weights = true;
  std::vector<Pe> pes;
};

// Sizes from 0 to a few dozen, tiles from 1 element to more than the whole problem.
Layer random_layer(Random& random);
Routing random_routing(Random& random);

}  // namespace flashmoe::testing
