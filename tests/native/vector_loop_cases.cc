// The vector loops of every instruction set that this CPU has, against scalar ones.
#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/cpu/simd/kernels.h"
#include "tests/native/activation_bounds.h"
#include "tests/native/harness.h"

namespace flashmoe::testing {
namespace {

using cpu::Activation;
using cpu::BFloat16;
using cpu::Float16;
using cpu::simd::ActivationTile;
using cpu::simd::GradientTile;
using cpu::simd::KernelSet;
using cpu::simd::MatrixView;

// Half the spacing of the element type's numbers near `value`.
template <typename S>
double storage_error(double value) {
  if constexpr (std::is_same_v<S, float>) return std::abs(value) * kFloatRoundoff + kSmallest;
  const bool half = std::is_same_v<S, Float16>;
  return std::abs(value) * (half ? 0x1p-11 : 0x1p-8) + (half ? 0x1p-25 : 0x1p-134);
}

// Checks that `got` is `exact` within `error`, rounded to the element type.
template <typename S>
void check_stored(S got, double exact, double error, const std::string& what) {
  const double bound = error + storage_error<S>(std::abs(exact) + error);
  if (std::abs(cpu::to_float(got) - exact) <= bound) return;
  check(false, what + " is " + std::to_string(cpu::to_float(got)) + ", expected " +
                   std::to_string(exact) + " +- " + std::to_string(bound));
}

// A matrix of random numbers with room between its rows.
template <typename T>
class Table {
 public:
  Table(Random& random, int64_t rows, int64_t columns)
      : columns_(columns),
        stride_(columns + random.between(0, 3)),
        values_(static_cast<size_t>(rows * stride_)) {
    for (T& value : values_) value = cpu::from_float<T>(static_cast<float>(2 * random.normal()));
    before_ = values_;
  }

  T at(int64_t row, int64_t column) const { return values_[row * stride_ + column]; }
  MatrixView<T> view() { return {values_.data(), stride_}; }
  MatrixView<const T> const_view() const { return {values_.data(), stride_}; }
  const T* row(int64_t i) const { return values_.data() + i * stride_; }

  void check_nothing_between() const {
    for (size_t i = 0; i < values_.size(); ++i) {
      if (static_cast<int64_t>(i) % stride_ < columns_) continue;
      check(cpu::to_float(values_[i]) == cpu::to_float(before_[i]), "wrote beside a row");
    }
  }

 private:
  int64_t columns_, stride_;
  std::vector<T> values_, before_;
};

const std::vector<Activation> kActivations{Activation::kSilu, Activation::kGelu,
                                           Activation::kGeluTanh, Activation::kRelu,
                                           Activation::kRelu2};

// What any order of the same float operations gives is this close to the exact value and slope.
struct Activated {
  double value, value_error, slope, slope_error;
};
Activated activated(Activation kind, double x) {
  const auto value = static_cast<double>(exact_activation(kind, x));
  const bool is_relu = kind == Activation::kRelu || kind == Activation::kRelu2;
  return {value, activation_value_error(kind, x, value), static_cast<double>(exact_slope(kind, x)),
          activation_slope_error(kind) + (is_relu ? 1e-9 * (1 + std::abs(x)) : 1e-9)};
}

int64_t random_columns(Random& random) {
  return random.chance(0.5) ? random.between(1, 70)
                            : random.pick<int64_t>({255, 256, 511, 512, 513, 1027});
}

template <typename S>
void activations(const KernelSet& set, uint64_t seed) {
  Random random(seed);
  for (Activation kind : kActivations) {
    for (int i = 0; i < 8; ++i) {
      const int64_t rows = random.between(0, 5), columns = random_columns(random);
      const bool gated = random.chance(0.6), biased = random.chance(0.5), kept = random.chance(0.5);
      Table<float> gate(random, rows, columns), up(random, rows, columns);
      Table<S> gate_bias(random, 1, columns), up_bias(random, 1, columns);
      Table<S> kept_gate(random, rows, columns), kept_up(random, rows, columns);
      Table<S> result(random, rows, columns);
      ActivationTile<S> tile{rows, columns, {}, {}, {}, {}, result.view()};
      tile.up = {up.const_view(), biased ? up_bias.row(0) : nullptr};
      if (gated) tile.gate = {gate.const_view(), biased ? gate_bias.row(0) : nullptr};
      if (kept) tile.kept_up = kept_up.view();
      if (kept && gated) tile.kept_gate = kept_gate.view();
      set.of<S>().activate[static_cast<int>(kind)](tile);

      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
          const auto sum = [&](const Table<float>& m, const Table<S>& bias) {
            return biased ? m.at(r, c) + cpu::to_float(bias.at(0, c)) : m.at(r, c);
          };
          const float u = sum(up, up_bias), g = sum(gate, gate_bias);
          const Activated act = activated(kind, gated ? g : u);
          const double factor = gated ? u : 1;
          const double exact = act.value * factor;
          check_stored(result.at(r, c), exact,
                       act.value_error * std::abs(factor) + 2 * kFloatRoundoff * std::abs(exact),
                       "activation of " + std::to_string(gated ? g : u));
          if (!kept) continue;
          const auto same = [](S a, float b) {
            return cpu::to_float(a) == cpu::to_float(cpu::from_float<S>(b));
          };
          check(same(kept_up.at(r, c), u), "another value of up was kept");
          check(!gated || same(kept_gate.at(r, c), g), "another value of gate was kept");
        }
      }
      for (const Table<S>* table : {&result, &kept_gate, &kept_up}) table->check_nothing_between();

      // An element has the same bits wherever in a row it stands.
      const int64_t first = random.between(0, columns - 1);
      Table<S> part(random, rows, columns - first);
      const auto skip = [&]<typename T>(MatrixView<T>& m) {
        if (m.data != nullptr) m.data += first;
      };
      const auto skip_inputs = [&](cpu::simd::PreActivations<S>& inputs) {
        skip(inputs.product);
        if (inputs.bias != nullptr) inputs.bias += first;
      };
      skip_inputs(tile.gate);
      skip_inputs(tile.up);
      tile.kept_gate = tile.kept_up = {};
      tile.columns -= first;
      tile.activated = part.view();
      set.of<S>().activate[static_cast<int>(kind)](tile);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = first; c < columns; ++c) {
          check(cpu::to_float(part.at(r, c - first)) == cpu::to_float(result.at(r, c)),
                "an activation depends on where in the row it stands");
        }
      }
    }
  }
}

template <typename S>
void gradients(const KernelSet& set, uint64_t seed) {
  Random random(seed);
  for (Activation kind : kActivations) {
    for (int i = 0; i < 8; ++i) {
      const int64_t rows = random.between(0, 5), columns = random_columns(random);
      const bool gated = random.chance(0.6), kept = random.chance(0.5);
      const bool biased = !kept && random.chance(0.5);
      Table<float> da(random, rows, columns), gate(random, rows, columns);
      Table<float> up(random, rows, columns), weights(random, 1, rows), shares(random, rows, 1);
      Table<S> gate_bias(random, 1, columns), up_bias(random, 1, columns);
      Table<S> kept_gate(random, rows, columns), kept_up(random, rows, columns);
      Table<S> d_gate(random, rows, columns), d_up(random, rows, columns);
      Table<S> weighted(random, rows, columns);
      GradientTile<S> tile{};
      tile.rows = rows;
      tile.columns = columns;
      tile.da = da.const_view();
      tile.weights = weights.row(0);
      if (kept) {
        tile.kept_up = kept_up.const_view();
        if (gated) tile.kept_gate = kept_gate.const_view();
      } else {
        tile.up = {up.const_view(), biased ? up_bias.row(0) : nullptr};
        if (gated) tile.gate = {gate.const_view(), biased ? gate_bias.row(0) : nullptr};
      }
      if (gated) tile.d_gate = d_gate.view();
      tile.d_up = d_up.view();
      tile.weighted = weighted.view();
      tile.shares = shares.view();
      set.of<S>().activation_gradient[static_cast<int>(kind)](tile);

      for (int64_t r = 0; r < rows; ++r) {
        double share = 0, share_error = 0;
        const double w = weights.at(0, r);
        for (int64_t c = 0; c < columns; ++c) {
          const auto input = [&](const Table<float>& m, const Table<S>& bias, const Table<S>& k) {
            if (kept) return cpu::to_float(k.at(r, c));
            return biased ? m.at(r, c) + cpu::to_float(bias.at(0, c)) : m.at(r, c);
          };
          const double u = input(up, up_bias, kept_up), g = input(gate, gate_bias, kept_gate);
          const double d = da.at(r, c), factor = gated ? u : 1;
          const Activated act = activated(kind, gated ? g : u);
          // Each product of at most four floats is three roundings off.
          const auto close = [&](S got, double scale, double of, double error, const char* what) {
            check_stored(got, scale * of,
                         std::abs(scale) * (error + 4 * kFloatRoundoff * std::abs(of)), what);
          };
          close(weighted.at(r, c), w * factor, act.value, act.value_error, "w a");
          if (gated) {
            close(d_up.at(r, c), w * d, act.value, act.value_error, "d up");
            close(d_gate.at(r, c), w * d * u, act.slope, act.slope_error, "d gate");
          } else {
            close(d_up.at(r, c), w * d, act.slope, act.slope_error, "d up");
          }
          const double term = d * factor * act.value;
          share += term;
          share_error += std::abs(d * factor) * act.value_error +
                         (3 + static_cast<double>(columns)) * kFloatRoundoff * std::abs(term);
        }
        check(std::abs(shares.at(r, 0) - share) <= share_error, "the share is off");
      }
      for (const Table<S>* table : {&d_gate, &d_up, &weighted}) table->check_nothing_between();
      shares.check_nothing_between();
    }
  }
}

template <typename S>
void rows(const KernelSet& set, uint64_t seed) {
  Random random(seed);
  const auto& kernels = set.of<S>();
  for (int i = 0; i < 60; ++i) {
    const int64_t count = random.between(0, 9), columns = random_columns(random);
    Table<float> numbers(random, 1, columns), weights(random, 1, count);
    Table<S> matrix(random, count, columns), bias(random, 1, columns), to(random, 1, columns);

    const bool biased = random.chance(0.5);
    kernels.round_row(numbers.row(0), biased ? bias.row(0) : nullptr, to.view().data, columns);
    for (int64_t c = 0; c < columns; ++c) {
      const float sum = numbers.at(0, c) + (biased ? cpu::to_float(bias.at(0, c)) : 0);
      check(cpu::to_float(to.at(0, c)) == cpu::to_float(cpu::from_float<S>(sum)),
            "a row was rounded to other values");
    }

    const bool weighted = random.chance(0.5);
    const float* factors = weighted ? weights.row(0) : nullptr;
    std::vector<const S*> pointers;
    for (int64_t r = 0; r < count; ++r) pointers.push_back(matrix.row(r));
    Table<S> sum(random, 1, columns);
    kernels.sum_rows(pointers.data(), factors, count, sum.view().data, columns);
    kernels.sum_matrix_rows(matrix.const_view(), factors, count, to.view().data, columns);
    for (int64_t c = 0; c < columns; ++c) {
      double exact = 0, magnitude = 0;
      for (int64_t r = 0; r < count; ++r) {
        const double term = (weighted ? weights.at(0, r) : 1.0) * cpu::to_float(matrix.at(r, c));
        exact += term;
        magnitude += std::abs(term);
      }
      check_stored(sum.at(0, c), exact, static_cast<double>(count + 1) * kFloatRoundoff * magnitude,
                   "a sum of rows");
      check(cpu::to_float(sum.at(0, c)) == cpu::to_float(to.at(0, c)),
            "the rows of a matrix have another sum");
    }
    to.check_nothing_between();
    sum.check_nothing_between();

    double exact = 0, magnitude = 0;
    for (int64_t c = 0; c < columns; ++c) {
      const double term = double{cpu::to_float(bias.at(0, c))} * cpu::to_float(to.at(0, c));
      exact += term;
      magnitude += std::abs(term);
    }
    check(std::abs(kernels.dot(bias.row(0), to.row(0), columns) - exact) <=
              static_cast<double>(columns + 1) * kFloatRoundoff * magnitude,
          "a dot product is off");
  }
}

template <typename S>
void add_cases(const KernelSet& set, const char* type, std::vector<Case>& cases) {
  const auto add = [&](const char* what, void (*run)(const KernelSet&, uint64_t)) {
    cases.push_back({std::string("vector loops: ") + what + ", " + set.name + " " + type,
                     [&set, run](uint64_t seed) { run(set, seed); }});
  };
  add("activations", activations<S>);
  add("gradients", gradients<S>);
  add("rows", rows<S>);
}

}  // namespace

std::vector<Case> vector_loop_cases() {
  std::vector<Case> cases;
  const KernelSet* before = nullptr;
  for (const KernelSet& set : cpu::simd::supported_kernels()) {
    // A set may share its loops with the one before it.
    if (before == nullptr || before->float32.dot != set.float32.dot) {
      add_cases<float>(set, "float32", cases);
      add_cases<BFloat16>(set, "bfloat16", cases);
      add_cases<Float16>(set, "float16", cases);
    }
    before = &set;
  }
  return cases;
}

}  // namespace flashmoe::testing
