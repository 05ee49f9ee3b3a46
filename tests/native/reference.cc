#include "tests/native/reference.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "tests/native/activation_bounds.h"

namespace flashmoe::testing {
namespace {

using cpu::Activation;
using cpu::DType;

Bounded exact(double value) { return {value, 0}; }

Bounded operator*(Bounded a, Bounded b) {
  const double product = a.value * b.value;
  const double inherited =
      std::abs(a.value) * b.error + std::abs(b.value) * a.error + a.error * b.error;
  return {product, inherited + kFloatRoundoff * (std::abs(product) + inherited) + kSmallest};
}

// A sum of products in any order: with n terms, each is rounded at most n times.
class Sum {
 public:
  void add(Bounded a, Bounded b = {1, 0}) {
    value_ += a.value * b.value;
    inherited_ += std::abs(a.value) * b.error + std::abs(b.value) * a.error + a.error * b.error;
    magnitude_ += (std::abs(a.value) + a.error) * (std::abs(b.value) + b.error);
    ++terms_;
  }
  Bounded total() const {
    return {value_, inherited_ + (terms_ + 1) * (kFloatRoundoff * magnitude_ + kSmallest)};
  }

 private:
  double value_ = 0, inherited_ = 0, magnitude_ = 0;
  int64_t terms_ = 0;
};

// Rounded to the element type.
Bounded stored(Bounded x, DType dtype) {
  const double size = std::abs(x.value) + x.error;
  switch (dtype) {
    case DType::kBFloat16:  // 8 significant bits
      x.error += 0x1p-8 * size + kSmallest;
      break;
    case DType::kFloat16:  // 11 significant bits, and subnormals with a spacing of 2^-24
      x.error += 0x1p-11 * size + 0x1p-25;
      break;
    case DType::kFloat32:
      break;
  }
  return x;
}

struct Activated {
  Bounded value, slope;
};

Activated activate(Activation kind, Bounded x) {
  const double size = std::abs(x.value) + x.error;
  // Largest slope, and slope of the slope, near x.
  double steepness = 1.15, curvature = 0.85;
  if (kind == Activation::kRelu) steepness = 1, curvature = 0;
  if (kind == Activation::kRelu2) steepness = 2 * size, curvature = 2;
  const double value = static_cast<double>(exact_activation(kind, x.value));
  const double slope = static_cast<double>(exact_slope(kind, x.value));
  double slope_error = x.error * curvature + activation_slope_error(kind) + kSlopeStep * kSlopeStep;
  // On which side of its bend relu is evaluated may depend on the error of x.
  if (kind == Activation::kRelu && x.error > 0 && std::abs(x.value) <= x.error) slope_error += 1;
  const double inherited = x.error * steepness;
  return {{value, inherited + activation_value_error(kind, size, std::abs(value) + inherited)},
          {slope, slope_error}};
}

// A kept (token, slot) pair.
struct Row {
  int32_t pe;
  int64_t slot;
};

// The rows that each expert keeps, in global token order.
std::vector<std::vector<Row>> kept_rows(const Problem& problem) {
  const core::Shape& shape = problem.layer.shape;
  std::vector<std::vector<Row>> rows(shape.num_experts);
  for (int32_t pe = 0; pe < shape.num_pes; ++pe) {
    for (int64_t slot = 0; slot < shape.slots(); ++slot) {
      const int32_t expert = problem.pes[pe].indices[slot];
      if (expert >= 0) rows[expert].push_back({pe, slot});
    }
  }
  const auto fits = [&](int64_t cap) {
    for (int32_t pe = 0; pe < shape.num_pes; ++pe) {
      int64_t received = 0;
      for (int32_t e = 0; e < shape.num_experts; ++e) {
        if (e / shape.local_experts() == pe) {
          received += std::min(static_cast<int64_t>(rows[e].size()), cap);
        }
      }
      if (received > shape.max_rows) return false;
    }
    return true;
  };
  int64_t cap =
      shape.capacity != core::kNoCapacity ? shape.capacity : int64_t{shape.num_pes} * shape.slots();
  while (!fits(cap)) --cap;
  for (std::vector<Row>& kept : rows) {
    if (static_cast<int64_t>(kept.size()) > cap) kept.resize(static_cast<size_t>(cap));
  }
  return rows;
}

// One expert's parameters, by matrix element.
class Expert {
 public:
  Expert(const Problem& problem, int32_t expert)
      : shape_(problem.layer.shape),
        local_(expert % shape_.local_experts()),
        experts_(problem.pes[expert / shape_.local_experts()].experts) {}

  Bounded gate(int64_t h, int64_t d) const { return exact(experts_.gate.get(up_index(h, d))); }
  Bounded up(int64_t h, int64_t d) const { return exact(experts_.up.get(up_index(h, d))); }
  Bounded down(int64_t d, int64_t h) const { return exact(experts_.down.get(down_index(d, h))); }
  Bounded gate_bias(int64_t d) const { return wide(experts_.gate_bias, d); }
  Bounded up_bias(int64_t d) const { return wide(experts_.up_bias, d); }
  Bounded down_bias(int64_t h) const {
    return exact(experts_.down_bias.get(local_ * shape_.hidden + h));
  }
  int64_t up_index(int64_t h, int64_t d) const {
    return (local_ * shape_.hidden + h) * shape_.intermediate + d;
  }
  int64_t down_index(int64_t d, int64_t h) const {
    return (local_ * shape_.intermediate + d) * shape_.hidden + h;
  }
  int64_t local() const { return local_; }

 private:
  Bounded wide(const Tensor& bias, int64_t d) const {
    return exact(bias.get(local_ * shape_.intermediate + d));
  }

  const core::Shape& shape_;
  const int64_t local_;
  const Experts& experts_;
};

std::vector<Bounded> totals(const std::vector<Sum>& sums, DType dtype) {
  std::vector<Bounded> results;
  results.reserve(sums.size());
  for (const Sum& sum : sums) results.push_back(stored(sum.total(), dtype));
  return results;
}

// Weight gradients while they are summed.
struct ExpertSums {
  std::vector<Sum> gate, up, down, gate_bias, up_bias, down_bias;

  ExpertSums(const core::Shape& shape) {
    const size_t experts = static_cast<size_t>(shape.local_experts());
    const size_t hidden = static_cast<size_t>(shape.hidden);
    const size_t width = static_cast<size_t>(shape.intermediate);
    gate.resize(experts * hidden * width);
    up.resize(experts * hidden * width);
    down.resize(experts * hidden * width);
    gate_bias.resize(experts * width);
    up_bias.resize(experts * width);
    down_bias.resize(experts * hidden);
  }
  ExpectedExperts totals(DType dtype) const {
    const auto of = [dtype](const std::vector<Sum>& sums) {
      return flashmoe::testing::totals(sums, dtype);
    };
    return {of(gate), of(up), of(down), of(gate_bias), of(up_bias), of(down_bias)};
  }
};

// Forward and backward of one row: adds to y and dx of its token and to the expert's gradients.
struct RowPass {
  const Layer& layer;
  const Pe& pe;
  const Expert& expert;
  int64_t slot;

  int64_t hidden() const { return layer.shape.hidden; }
  int64_t width() const { return layer.shape.intermediate; }
  int64_t token() const { return slot / layer.shape.experts_per_token; }
  Bounded x(int64_t h) const { return exact(pe.x.get(token() * hidden() + h)); }
  Bounded dy(int64_t h) const { return exact(pe.dy.get(token() * hidden() + h)); }
  Bounded weight() const { return exact(pe.weights.get(slot)); }
  Bounded factor(Bounded of) const {
    of.error += layer.factor_error * (std::abs(of.value) + of.error);
    return of;
  }

  template <typename Weights, typename Bias>
  Bounded pre_activation(int64_t d, Weights weights, Bias bias) const {
    Sum sum;
    for (int64_t h = 0; h < hidden(); ++h) sum.add(factor(x(h)), factor(weights(h, d)));
    if (layer.biased) sum.add(bias(d));
    return sum.total();
  }
  Bounded gate(int64_t d) const {
    return pre_activation(
        d, [&](int64_t h, int64_t i) { return expert.gate(h, i); },
        [&](int64_t i) { return expert.gate_bias(i); });
  }
  Bounded up(int64_t d) const {
    return pre_activation(
        d, [&](int64_t h, int64_t i) { return expert.up(h, i); },
        [&](int64_t i) { return expert.up_bias(i); });
  }

  void run(std::vector<Sum>& y, std::vector<Sum>& dx, Bounded& d_weight, ExpertSums& sums) const {
    const auto at = [](int64_t i) { return static_cast<size_t>(i); };
    std::vector<Sum> out(at(hidden())), d_row(at(hidden()));
    Sum d_weight_sum;
    for (int64_t d = 0; d < width(); ++d) {
      const Bounded g = layer.gated ? gate(d) : Bounded{}, u = up(d);
      const Bounded a = layer.gated ? activate(layer.activation, g).value * u
                                    : activate(layer.activation, u).value;
      const Bounded hidden_unit = stored(a, layer.dtype);
      for (int64_t h = 0; h < hidden(); ++h) {
        out[at(h)].add(factor(hidden_unit), factor(expert.down(d, h)));
      }

      // Backward sees the pre-activations as forward stored them.
      const auto kept = [&](Bounded pre) {
        return layer.save_preactivations ? stored(pre, layer.dtype) : pre;
      };
      Sum da_sum;
      for (int64_t h = 0; h < hidden(); ++h) da_sum.add(dy(h), expert.down(d, h));
      const Bounded da = da_sum.total(), weighted = weight() * da;
      const Activated act = activate(layer.activation, kept(layer.gated ? g : u));
      Bounded wa = weight() * act.value, du;
      if (layer.gated) {
        wa = wa * kept(u);
        du = weighted * act.value;
        const Bounded dg = stored(weighted * kept(u) * act.slope, layer.dtype);
        d_weight_sum.add(da * act.value, kept(u));
        for (int64_t h = 0; h < hidden(); ++h) {
          d_row[at(h)].add(dg, expert.gate(h, d));
          sums.gate[at(expert.up_index(h, d))].add(x(h), dg);
        }
        sums.gate_bias[at(expert.local() * width() + d)].add(dg);
      } else {
        du = weighted * act.slope;
        d_weight_sum.add(da, act.value);
      }
      wa = stored(wa, layer.dtype);
      du = stored(du, layer.dtype);
      for (int64_t h = 0; h < hidden(); ++h) {
        d_row[at(h)].add(du, expert.up(h, d));
        sums.up[at(expert.up_index(h, d))].add(x(h), du);
        sums.down[at(expert.down_index(d, h))].add(wa, dy(h));
      }
      sums.up_bias[at(expert.local() * width() + d)].add(du);
    }
    for (int64_t h = 0; h < hidden(); ++h) {
      if (layer.biased) {
        out[at(h)].add(expert.down_bias(h));
        d_weight_sum.add(dy(h), expert.down_bias(h));
      }
      sums.down_bias[at(expert.local() * hidden() + h)].add(weight() * dy(h));
      const int64_t i = token() * hidden() + h;
      y[at(i)].add(weight(), stored(out[at(h)].total(), layer.dtype));
      dx[at(i)].add(stored(d_row[at(h)].total(), layer.dtype));
    }
    d_weight = d_weight_sum.total();
  }
};

void check_tensor(const Problem& problem, int32_t pe, const char* name, const Tensor& got,
                  const std::vector<Bounded>& expected) {
  if (got.is_absent()) return;
  check(static_cast<size_t>(got.size()) == expected.size(), "sizes of the test itself differ");
  for (size_t i = 0; i < expected.size(); ++i) {
    const double value = got.get(static_cast<int64_t>(i));
    if (std::abs(value - expected[i].value) <= expected[i].error) continue;
    check(false, std::string(name) + "[" + std::to_string(i) + "] of PE " + std::to_string(pe) +
                     " is " + std::to_string(value) + ", expected " +
                     std::to_string(expected[i].value) + " +- " +
                     std::to_string(expected[i].error) + " (" + problem.description() + ")");
  }
}

}  // namespace

std::vector<Expected> expect(const Problem& problem) {
  const Layer& layer = problem.layer;
  const core::Shape& shape = layer.shape;
  const size_t values = static_cast<size_t>(int64_t{shape.tokens} * shape.hidden);
  const size_t pes = static_cast<size_t>(shape.num_pes);
  std::vector<Expected> expected(pes);
  std::vector<std::vector<Sum>> y(pes, std::vector<Sum>(values)), dx = y;
  std::vector<ExpertSums> sums(pes, ExpertSums(shape));
  for (size_t i = 0; i < pes; ++i) {
    expected[i].d_weights.resize(static_cast<size_t>(shape.slots()));
    const std::vector<int32_t>& indices = problem.pes[i].indices;
    expected[i].dropped = static_cast<int32_t>(
        std::count_if(indices.begin(), indices.end(), [](int32_t e) { return e >= 0; }));
  }
  const std::vector<std::vector<Row>> rows = kept_rows(problem);
  for (int32_t e = 0; e < shape.num_experts; ++e) {
    const Expert expert(problem, e);
    for (const Row& row : rows[static_cast<size_t>(e)]) {
      const size_t pe = static_cast<size_t>(row.pe);
      --expected[pe].dropped;
      RowPass{layer, problem.pes[pe], expert, row.slot}.run(
          y[pe], dx[pe], expected[pe].d_weights[static_cast<size_t>(row.slot)],
          sums[static_cast<size_t>(e / shape.local_experts())]);
    }
  }
  for (size_t i = 0; i < pes; ++i) {
    expected[i].y = totals(y[i], layer.dtype);
    expected[i].dx = totals(dx[i], layer.dtype);
    expected[i].d_experts = sums[i].totals(layer.dtype);
  }
  return expected;
}

void check_forward_of(int32_t pe, const Problem& problem, const std::vector<Expected>& expected) {
  const Pe& got = problem.pes[static_cast<size_t>(pe)];
  const Expected& want = expected[static_cast<size_t>(pe)];
  check_tensor(problem, pe, "y", got.y, want.y);
  check(got.dropped[0] == want.dropped,
        "PE " + std::to_string(pe) + " dropped " + std::to_string(got.dropped[0]) +
            " rows, expected " + std::to_string(want.dropped) + " (" + problem.description() + ")");
}

void check_forward(const Problem& problem, const std::vector<Expected>& expected) {
  for (int32_t pe = 0; pe < problem.layer.shape.num_pes; ++pe) {
    check_forward_of(pe, problem, expected);
  }
}

void check_backward(const Problem& problem, const std::vector<Expected>& expected) {
  for (int32_t pe = 0; pe < problem.layer.shape.num_pes; ++pe) {
    const Pe& got = problem.pes[static_cast<size_t>(pe)];
    const Expected& want = expected[static_cast<size_t>(pe)];
    check_tensor(problem, pe, "dx", got.dx, want.dx);
    check_tensor(problem, pe, "d weights", got.d_weights, want.d_weights);
    check_tensor(problem, pe, "d gate", got.d_experts.gate, want.d_experts.gate);
    check_tensor(problem, pe, "d up", got.d_experts.up, want.d_experts.up);
    check_tensor(problem, pe, "d down", got.d_experts.down, want.d_experts.down);
    check_tensor(problem, pe, "d gate_bias", got.d_experts.gate_bias, want.d_experts.gate_bias);
    check_tensor(problem, pe, "d up_bias", got.d_experts.up_bias, want.d_experts.up_bias);
    check_tensor(problem, pe, "d down_bias", got.d_experts.down_bias, want.d_experts.down_bias);
  }
}

}  // namespace flashmoe::testing
