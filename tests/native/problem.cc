#include "tests/native/problem.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace flashmoe::testing {

using cpu::Activation;
using cpu::BFloat16;
using cpu::DType;
using cpu::Float16;

Tensor::Tensor(DType dtype, int64_t size) : dtype_(dtype), size_(size) {
  data_ = std::make_unique<std::byte[]>(static_cast<size_t>(size * element_bytes()));
  clear();
}

double Tensor::get(int64_t i) const {
  switch (dtype_) {
    case DType::kBFloat16:
      return cpu::to_float(reinterpret_cast<const BFloat16*>(data_.get())[i]);
    case DType::kFloat16:
      return cpu::to_float(reinterpret_cast<const Float16*>(data_.get())[i]);
    case DType::kFloat32:
      break;
  }
  return reinterpret_cast<const float*>(data_.get())[i];
}

void Tensor::set(int64_t i, double value) {
  const float rounded = static_cast<float>(value);
  switch (dtype_) {
    case DType::kBFloat16:
      reinterpret_cast<BFloat16*>(data_.get())[i] = cpu::from_float<BFloat16>(rounded);
      return;
    case DType::kFloat16:
      reinterpret_cast<Float16*>(data_.get())[i] = cpu::from_float<Float16>(rounded);
      return;
    case DType::kFloat32:
      reinterpret_cast<float*>(data_.get())[i] = rounded;
  }
}

void Tensor::clear() { std::fill_n(data_.get(), size_ * element_bytes(), std::byte{0xff}); }

std::vector<std::byte> Tensor::bytes() const {
  return {data_.get(), data_.get() + size_ * element_bytes()};
}

std::vector<const Tensor*> Pe::backward_results() const {
  std::vector<const Tensor*> results{&dx, &d_weights};
  for (const Tensor* gradient : {&d_experts.gate, &d_experts.up, &d_experts.down,
                                 &d_experts.gate_bias, &d_experts.up_bias, &d_experts.down_bias}) {
    if (!gradient->is_absent()) results.push_back(gradient);
  }
  return results;
}

namespace {

Tensor normal(DType dtype, int64_t size, double scale, Random& random) {
  Tensor tensor(dtype, size);
  for (int64_t i = 0; i < size; ++i) tensor.set(i, scale * random.normal());
  return tensor;
}

// `make` gives a tensor of a size and a scale.
template <typename Make>
Experts make_experts(const Layer& layer, Make make) {
  const core::Shape& shape = layer.shape;
  const int64_t experts = shape.local_experts();
  const int64_t matrix = experts * shape.hidden * shape.intermediate;
  const double up_scale = 1 / std::sqrt(shape.hidden),
               down_scale = 1 / std::sqrt(shape.intermediate);
  Experts made;
  if (layer.gated) made.gate = make(matrix, up_scale);
  made.up = make(matrix, up_scale);
  made.down = make(matrix, down_scale);
  if (layer.biased) {
    if (layer.gated) made.gate_bias = make(experts * shape.intermediate, 0.5);
    made.up_bias = make(experts * shape.intermediate, 0.5);
    made.down_bias = make(experts * shape.hidden, 0.5);
  }
  return made;
}

std::vector<int32_t> route(const core::Shape& shape, Routing routing, int32_t pe, Random& random) {
  const int32_t experts = shape.num_experts, k = shape.experts_per_token;
  std::vector<int32_t> all(experts);
  for (int32_t e = 0; e < experts; ++e) all[e] = e;
  const bool masked = routing == Routing::kAllMasked ||
                      (routing == Routing::kSomePesMasked && pe % 2 == shape.num_pes % 2);
  std::vector<int32_t> indices;
  indices.reserve(static_cast<size_t>(shape.slots()));
  for (int32_t token = 0; token < shape.tokens; ++token) {
    random.shuffle(all);
    for (int32_t slot = 0; slot < k; ++slot) {
      int32_t expert = all[slot];
      if (routing == Routing::kRepeating)
        expert = static_cast<int32_t>(random.between(0, experts - 1));
      if (routing == Routing::kSkewed) expert = std::min(all[slot], all[(slot + 1) % experts]);
      if (routing == Routing::kAllToOne) expert = experts / 2;
      indices.push_back(masked || random.chance(0.1) ? -1 : expert);
    }
  }
  return indices;
}

}  // namespace

Problem::Problem(const Layer& layer, Routing routing, uint64_t seed) : layer(layer), seed(seed) {
  Random random(seed);
  const core::Shape& shape = layer.shape;
  const DType dtype = layer.dtype;
  const int64_t values = int64_t{shape.tokens} * shape.hidden;
  for (int32_t i = 0; i < shape.num_pes; ++i) {
    Pe pe;
    pe.x = normal(dtype, values, 1, random);
    pe.indices = route(shape, routing, i, random);
    pe.weights = Tensor(DType::kFloat32, shape.slots());
    for (int64_t slot = 0; slot < shape.slots(); ++slot) {
      // The weight of a masked slot is ignored, whatever it is.
      pe.weights.set(slot, pe.indices[slot] < 0 ? NAN : 0.1 + random.uniform());
    }
    pe.experts = make_experts(
        layer, [&](int64_t size, double scale) { return normal(dtype, size, scale, random); });
    pe.dy = normal(dtype, values, 1, random);

    pe.y = Tensor(dtype, values);
    pe.dropped = {-1};
    if (layer.save_rows) pe.rows = Tensor(dtype, shape.recv_rows() * shape.hidden);
    if (layer.save_preactivations) {
      if (layer.gated) pe.pre_gate = Tensor(dtype, shape.recv_rows() * shape.intermediate);
      pe.pre_up = Tensor(dtype, shape.recv_rows() * shape.intermediate);
    }
    pe.dx = Tensor(dtype, values);
    pe.d_weights = Tensor(DType::kFloat32, shape.slots());
    pe.d_experts = make_experts(layer, [&](int64_t size, double) { return Tensor(dtype, size); });
    pes.push_back(std::move(pe));
  }
}

cpu::CallConfig Problem::config(bool backward) const {
  return {
      .shape = layer.shape,
      .traffic = {.backward = backward,
                  .resend_rows = backward && !layer.save_rows,
                  .element_bytes = layer.dtype == DType::kFloat32 ? 4 : 2},
      .dtype = layer.dtype,
      .activation = layer.activation,
      .tag = tag,
      .deadline = deadline,
      .check_weights = check_weights,
  };
}

namespace {

cpu::RoutedTokens routed_tokens(const Pe& pe) {
  return {pe.x.data(), pe.indices.data(), static_cast<const float*>(pe.weights.data())};
}
cpu::ExpertWeights expert_weights(const Experts& experts) {
  return {experts.gate.data(),      experts.up.data(),      experts.down.data(),
          experts.gate_bias.data(), experts.up_bias.data(), experts.down_bias.data()};
}

}  // namespace

cpu::ForwardBuffers Problem::forward_buffers(int32_t pe) const {
  const Pe& mine = pes[pe];
  return {
      .tokens = routed_tokens(mine),
      .experts = expert_weights(mine.experts),
      .y = mine.y.data(),
      .dropped = const_cast<int32_t*>(mine.dropped.data()),
      .kept = {mine.rows.data(), mine.pre_gate.data(), mine.pre_up.data()},
  };
}

cpu::BackwardBuffers Problem::backward_buffers(int32_t pe) const {
  const Pe& mine = pes[pe];
  const Experts& gradients = mine.d_experts;
  return {
      .tokens = routed_tokens(mine),
      .experts = expert_weights(mine.experts),
      .kept = {mine.rows.data(), mine.pre_gate.data(), mine.pre_up.data()},
      .dy = mine.dy.data(),
      .dx = mine.dx.data(),
      .d_weights = static_cast<float*>(mine.d_weights.data()),
      .d_experts = {gradients.gate.data(), gradients.up.data(), gradients.down.data(),
                    gradients.gate_bias.data(), gradients.up_bias.data(),
                    gradients.down_bias.data()},
  };
}

void Problem::clear_results() {
  for (Pe& pe : pes) {
    pe.dropped = {-1};
    for (Tensor* result :
         {&pe.y, &pe.rows, &pe.pre_gate, &pe.pre_up, &pe.dx, &pe.d_weights, &pe.d_experts.gate,
          &pe.d_experts.up, &pe.d_experts.down, &pe.d_experts.gate_bias, &pe.d_experts.up_bias,
          &pe.d_experts.down_bias}) {
      result->clear();
    }
  }
}

std::string Problem::description() const {
  const core::Shape& shape = layer.shape;
  std::string text = "P=" + std::to_string(shape.num_pes);
  const auto add = [&](const char* name, int64_t value) {
    text.append(" ").append(name).append("=").append(std::to_string(value));
  };
  add("T", shape.tokens);
  add("K", shape.experts_per_token);
  add("E", shape.num_experts);
  add("H", shape.hidden);
  add("D", shape.intermediate);
  add("capacity", shape.capacity);
  add("max_rows", shape.max_rows);
  add("block_rows", shape.block_rows);
  add("block_tokens", shape.block_tokens);
  add("block_columns", shape.block_columns);
  add("dtype", static_cast<int64_t>(layer.dtype));
  add("activation", static_cast<int64_t>(layer.activation));
  add("gated", layer.gated);
  add("biased", layer.biased);
  add("save_rows", layer.save_rows);
  add("save_preactivations", layer.save_preactivations);
  add("seed", static_cast<int64_t>(seed));
  return text;
}

std::vector<std::byte> Problem::result_bytes(bool backward) const {
  std::vector<std::byte> all;
  for (const Pe& pe : pes) {
    for (const Tensor* result : backward ? pe.backward_results() : pe.forward_results()) {
      const std::vector<std::byte> bytes = result->bytes();
      all.insert(all.end(), bytes.begin(), bytes.end());
    }
  }
  return all;
}

Layer random_layer(Random& random) {
  const auto size = [&](int64_t low, int64_t high) {
    return static_cast<int32_t>(random.between(low, high));
  };
  Layer layer{};
  core::Shape& shape = layer.shape;
  shape.num_pes = size(1, 8);
  shape.num_experts = shape.num_pes * size(1, 4);
  shape.experts_per_token = size(1, std::min(4, shape.num_experts));
  shape.tokens = random.chance(0.05) ? 0 : size(1, 40);
  shape.hidden = size(1, 33);
  shape.intermediate = size(1, 33);
  const int64_t all_rows = shape.num_pes * shape.slots();
  shape.capacity = random.chance(0.3) ? random.between(1, 1 + 2 * all_rows / shape.num_experts)
                                      : core::kNoCapacity;
  shape.max_rows =
      random.chance(0.3) ? random.between(0, 1 + 2 * all_rows / shape.num_pes) : all_rows;
  shape.block_rows = random.pick<int32_t>({1, 2, 3, 8, 16, 128});
  shape.block_tokens = random.pick<int32_t>({1, 3, 8, 32});
  shape.block_columns = random.pick<int32_t>({1, 5, 16, 64});
  layer.dtype = random.pick<DType>({DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  layer.activation =
      random.pick<Activation>({Activation::kSilu, Activation::kGelu, Activation::kGeluTanh,
                               Activation::kRelu, Activation::kRelu2});
  layer.gated = random.chance(0.5);
  layer.biased = random.chance(0.5);
  layer.save_rows = random.chance(0.5);
  layer.save_preactivations = random.chance(0.5);
  return layer;
}

Routing random_routing(Random& random) {
  return random.pick<Routing>({Routing::kDistinct, Routing::kDistinct, Routing::kRepeating,
                               Routing::kRepeating, Routing::kSkewed, Routing::kAllToOne,
                               Routing::kSomePesMasked, Routing::kAllMasked});
}

}  // namespace flashmoe::testing
