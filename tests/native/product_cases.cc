// Matrix products of every instruction set that this CPU has, against products in double.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/cpu/simd/kernels.h"
#include "tests/native/activation_bounds.h"
#include "tests/native/harness.h"

namespace flashmoe::testing {
namespace {

using cpu::BFloat16;
using cpu::Float16;
using cpu::simd::KernelSet;
using cpu::simd::MatrixView;
using cpu::simd::Operand;
using cpu::simd::Product;
using cpu::simd::Transpose;

// Memory that ends where a page begins that may not be touched: a read or write past the end is a
// crash, also one that no sanitizer sees, such as that of a tile instruction.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t count) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    const int64_t usable = (bytes + page - 1) / page * page;
    size_ = static_cast<size_t>(usable + page);
    region_ = static_cast<char*>(
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (region_ == MAP_FAILED) throw std::bad_alloc();
    if (mprotect(region_ + usable, static_cast<size_t>(page), PROT_NONE) != 0) {
      throw std::bad_alloc();
    }
    data_ = reinterpret_cast<T*>(region_ + usable - bytes);
    count_ = count;
  }
  ~Guarded() { munmap(region_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return data_; }
  int64_t count() const { return count_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  char* region_;
  size_t size_;
  T* data_;
  int64_t count_;
};

// [rows, columns] in rows of `stride`; the last row ends with its last column.
int64_t extent(int64_t rows, int64_t columns, int64_t stride) {
  return rows == 0 || columns == 0 ? 0 : (rows - 1) * stride + columns;
}

// op(m) [rows, columns] with random values. The memory between its rows holds NaNs.
template <typename S>
struct Factor {
  Factor(Random& random, int64_t rows, int64_t columns, Transpose transpose)
      : transpose(transpose),
        stored_rows(transpose == Transpose::kYes ? columns : rows),
        stored_columns(transpose == Transpose::kYes ? rows : columns),
        stride(stored_columns + random.pick<int64_t>({0, 0, 1, 5, 64})),
        values(extent(stored_rows, stored_columns, stride)) {
    for (int64_t i = 0; i < values.count(); ++i) {
      const bool between = i % stride >= stored_columns;
      values[i] = cpu::from_float<S>(between ? std::numeric_limits<float>::quiet_NaN()
                                             : static_cast<float>(random.normal()));
    }
  }

  S& at(int64_t row, int64_t column) {
    return transpose == Transpose::kYes ? values[column * stride + row]
                                        : values[row * stride + column];
  }
  Operand<S> operand() { return {values.data(), stride, transpose}; }
  // From its row and column on.
  Operand<S> operand_from(int64_t row, int64_t column) {
    return {&at(row, column), stride, transpose};
  }

  Transpose transpose;
  int64_t stored_rows, stored_columns, stride;
  Guarded<S> values;
};

struct Sizes {
  int64_t m, n, k;
};

std::string describe(const Sizes& sizes) {
  return std::to_string(sizes.m) + " x " + std::to_string(sizes.n) + " x " +
         std::to_string(sizes.k);
}

// One side of a product: often at the edge of a vector, a tile, a panel or a block.
int64_t random_side(Random& random) {
  switch (random.between(0, 3)) {
    case 0:
      return random.between(0, 9);
    case 1:
      return std::max<int64_t>(
          0, random.pick<int64_t>({16, 32, 48, 64, 96, 128, 256}) + random.between(-1, 1));
    default:
      return random.between(1, 150);
  }
}

// The largest rounding error of storing a value in the element type.
template <typename S>
double storage_error(double value) {
  if constexpr (std::is_same_v<S, float>) return 0;
  const bool half = std::is_same_v<S, Float16>;
  return std::abs(value) * (half ? 0x1p-11 : 0x1p-8) + (half ? 0x1p-25 : 0x1p-134);
}

// The sum of k products in every element of a result, and the sum of their magnitudes.
struct Sums {
  std::vector<double> value, magnitude;
};

template <typename S>
Sums exact_sums(Factor<S>& a, Factor<S>& b, const Sizes& sizes) {
  Sums sums{std::vector<double>(static_cast<size_t>(sizes.m * sizes.n)),
            std::vector<double>(static_cast<size_t>(sizes.m * sizes.n))};
  std::vector<double> row(static_cast<size_t>(sizes.n));
  for (int64_t p = 0; p < sizes.k; ++p) {
    for (int64_t j = 0; j < sizes.n; ++j) row[j] = cpu::to_float(b.at(p, j));
    for (int64_t i = 0; i < sizes.m; ++i) {
      const double factor = cpu::to_float(a.at(i, p));
      for (int64_t j = 0; j < sizes.n; ++j) {
        sums.value[i * sizes.n + j] += factor * row[j];
        sums.magnitude[i * sizes.n + j] += std::abs(factor * row[j]);
      }
    }
  }
  return sums;
}

enum class Result { kFloats, kAccumulated, kRounded };
const std::vector<Result> kResults{Result::kFloats, Result::kAccumulated, Result::kRounded};

template <typename S>
void check_product(const KernelSet& set, Random& random, const Sizes& sizes, Transpose transpose_a,
                   Transpose transpose_b, Result result) {
  const auto [m, n, k] = sizes;
  Factor<S> a(random, m, k, transpose_a), b(random, k, n, transpose_b);
  const bool rounded = result == Result::kRounded, accumulate = result == Result::kAccumulated;
  const int64_t stride = n + random.pick<int64_t>({0, 1, 16});
  Guarded<float> c(extent(m, n, stride));
  Guarded<S> stored(extent(m, n, stride));
  std::vector<float> before(static_cast<size_t>(c.count()));
  for (int64_t i = 0; i < c.count(); ++i) {
    before[i] = c[i] = static_cast<float>(random.normal());
    stored[i] = cpu::from_float<S>(before[i]);
  }

  Product<S> product{m, n, k, a.operand(), b.operand(), {}, {}, accumulate};
  if (rounded) {
    product.rounded = {stored.data(), stride};
  } else {
    product.c = {c.data(), stride};
  }
  set.of<S>().multiply(product);

  const std::string where = describe(sizes) + (accumulate ? ", accumulated" : "") +
                            (rounded ? ", rounded" : "") +
                            (transpose_a == Transpose::kYes ? ", a transposed" : "") +
                            (transpose_b == Transpose::kYes ? ", b transposed" : "");
  const Sums sums = exact_sums(a, b, sizes);
  for (int64_t i = 0; i < c.count(); ++i) {
    const int64_t row = i / stride, column = i % stride;
    const double got = rounded ? cpu::to_float(stored[i]) : c[i];
    if (column >= n) {
      check(got == (rounded ? cpu::to_float(cpu::from_float<S>(before[i])) : before[i]),
            where + ": wrote beside the result");
      continue;
    }
    const double begin = accumulate ? before[i] : 0;
    const double exact = begin + sums.value[row * n + column];
    const double magnitude = std::abs(begin) + sums.magnitude[row * n + column];
    // k products and as many additions, in any order (Higham, chapter 3), then the storage.
    const double sum_error = (static_cast<double>(k) + 2) * kFloatRoundoff * magnitude;
    const double error = sum_error + (rounded ? storage_error<S>(std::abs(exact) + sum_error) : 0);
    if (std::abs(got - exact) <= error) continue;
    check(false, where + ": element (" + std::to_string(row) + ", " + std::to_string(column) +
                     ") is " + std::to_string(got) + ", expected " + std::to_string(exact));
  }
}

constexpr Transpose kTransposes[] = {Transpose::kNo, Transpose::kYes};

template <typename S>
void values(const KernelSet& set, uint64_t seed) {
  Random random(seed);
  for (int i = 0; i < 20; ++i) {
    const Sizes sizes{random_side(random), random_side(random), random_side(random)};
    for (Transpose a : kTransposes) {
      for (Transpose b : kTransposes) {
        check_product<S>(set, random, sizes, a, b, random.pick(kResults));
      }
    }
  }
  // More than one block in every direction.
  for (const Sizes& sizes : {Sizes{261, 33, 263}, Sizes{33, 530, 263}, Sizes{261, 530, 3}}) {
    for (Transpose a : kTransposes) {
      for (Transpose b : kTransposes) {
        for (Result result : kResults) check_product<S>(set, random, sizes, a, b, result);
      }
    }
  }
}

// Any part of the result has the same bits when it is computed alone, from other addresses, and
// with k in two pieces.
template <typename S>
void parts_have_the_same_bits(const KernelSet& set, uint64_t seed) {
  Random random(seed);
  for (int i = 0; i < 25; ++i) {
    const Sizes whole{random.between(1, 300), random.between(1, 600), random.between(1, 300)};
    const Transpose transpose_a = random.pick<Transpose>({Transpose::kNo, Transpose::kYes});
    const Transpose transpose_b = random.pick<Transpose>({Transpose::kNo, Transpose::kYes});
    Factor<S> a(random, whole.m, whole.k, transpose_a), b(random, whole.k, whole.n, transpose_b);
    std::vector<float> expected(static_cast<size_t>(whole.m * whole.n));
    set.of<S>().multiply({whole.m,
                          whole.n,
                          whole.k,
                          a.operand(),
                          b.operand(),
                          {expected.data(), whole.n},
                          {},
                          false});

    const int64_t row = random.between(0, whole.m - 1), column = random.between(0, whole.n - 1);
    const Sizes part{random.between(1, std::min<int64_t>(whole.m - row, 40)),
                     random.between(1, whole.n - column), whole.k};
    std::vector<float> memory(static_cast<size_t>(part.m * part.n + 1));
    const MatrixView<float> c{memory.data() + random.between(0, 1), part.n};
    // 32 neighbours along k are what amx adds at once.
    const int64_t cut = std::min<int64_t>(random.between(0, part.k / 32) * 32, part.k);
    set.of<S>().multiply(
        {part.m, part.n, cut, a.operand_from(row, 0), b.operand_from(0, column), c, {}, false});
    if (cut < part.k) {
      set.of<S>().multiply({part.m,
                            part.n,
                            part.k - cut,
                            a.operand_from(row, cut),
                            b.operand_from(cut, column),
                            c,
                            {},
                            true});
    }
    for (int64_t r = 0; r < part.m; ++r) {
      check(std::memcmp(c.data + r * part.n, expected.data() + (row + r) * whole.n + column,
                        static_cast<size_t>(part.n) * sizeof(float)) == 0,
            describe(whole) + ": other bits in a part of " + describe(part) + " from row " +
                std::to_string(row + r));
    }
  }
}

// What is no number stays in its row and its column: padding multiplies only padding.
template <typename S>
void no_number_spreads(const KernelSet& set, uint64_t seed) {
  Random random(seed);
  for (int i = 0; i < 40; ++i) {
    const Sizes sizes{random.between(1, 70), random.between(1, 140), random.between(1, 70)};
    Factor<S> a(random, sizes.m, sizes.k,
                random.pick<Transpose>({Transpose::kNo, Transpose::kYes}));
    Factor<S> b(random, sizes.k, sizes.n,
                random.pick<Transpose>({Transpose::kNo, Transpose::kYes}));
    const int64_t row = random.between(0, sizes.m - 1), column = random.between(0, sizes.n - 1);
    a.at(row, random.between(0, sizes.k - 1)) =
        cpu::from_float<S>(std::numeric_limits<float>::quiet_NaN());
    b.at(random.between(0, sizes.k - 1), column) =
        cpu::from_float<S>(std::numeric_limits<float>::infinity());
    std::vector<float> c(static_cast<size_t>(sizes.m * sizes.n));
    set.of<S>().multiply(
        {sizes.m, sizes.n, sizes.k, a.operand(), b.operand(), {c.data(), sizes.n}, {}, false});
    for (int64_t r = 0; r < sizes.m; ++r) {
      for (int64_t j = 0; j < sizes.n; ++j) {
        const float got = c[r * sizes.n + j];
        const bool right = r == row      ? std::isnan(got)
                           : j == column ? !std::isfinite(got)
                                         : std::isfinite(got);
        if (right) continue;
        check(false, describe(sizes) + ": element (" + std::to_string(r) + ", " +
                         std::to_string(j) + ") is " + std::to_string(got) + " with a NaN in row " +
                         std::to_string(row) + " and an infinity in column " +
                         std::to_string(column));
      }
    }
  }
}

void choice(uint64_t) {
  const std::vector<KernelSet>& supported = cpu::simd::supported_kernels();
  check(supported.front().name == std::string("portable"), "portable must always be there");
  for (const KernelSet& set : supported) {
    check(&cpu::simd::find_kernels(set.name) == &set, "a set must be found by its name");
  }
  const KernelSet* preferred = &cpu::simd::find_kernels("");
  check(std::any_of(supported.begin(), supported.end(),
                    [&](const KernelSet& set) { return &set == preferred; }),
        "the preferred set must be a supported one");
  try {
    cpu::simd::find_kernels("avx1024");
  } catch (const std::invalid_argument& error) {
    check_contains(error.what(), {"FLASHMOE_CPU_ISA", "'avx1024'", "portable"});
    return;
  }
  check(false, "an unknown set must be refused");
}

template <typename S>
void add_cases(const KernelSet& set, const char* type, std::vector<Case>& cases) {
  const auto add = [&](const char* what, void (*run)(const KernelSet&, uint64_t)) {
    cases.push_back({std::string("product: ") + what + ", " + set.name + " " + type,
                     [&set, run](uint64_t seed) { run(set, seed); }});
  };
  add("values", values<S>);
  add("parts have the same bits", parts_have_the_same_bits<S>);
  add("no number spreads", no_number_spreads<S>);
}

}  // namespace

std::vector<Case> product_cases() {
  std::vector<Case> cases{{"product: choice of the instruction set", choice}};
  // A set may share functions with the one before it.
  const KernelSet* before = nullptr;
  const auto is_new = [&]<typename S>(const KernelSet& set, S) {
    return before == nullptr || before->of<S>().multiply != set.of<S>().multiply;
  };
  for (const KernelSet& set : cpu::simd::supported_kernels()) {
    if (is_new(set, float{})) add_cases<float>(set, "float32", cases);
    if (is_new(set, BFloat16{})) add_cases<BFloat16>(set, "bfloat16", cases);
    if (is_new(set, Float16{})) add_cases<Float16>(set, "float16", cases);
    before = &set;
  }
  return cases;
}

}  // namespace flashmoe::testing
