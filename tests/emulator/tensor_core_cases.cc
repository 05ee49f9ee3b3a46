// The tensor-core functions against small tables from the PTX ISA, and the tile engines on the
// emulator against sums in double.
#include <array>
#include <bit>
#include <cstring>
#include <functional>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cpu/storage.h"
#include "kernels/cuda/engine_sm80.h"
#include "kernels/cuda/engine_sm90.h"
#include "kernels/emulator/tensor_core.h"
#include "tests/emulator/cases.h"
#include "tests/emulator/engine_trials.h"
#include "tests/native/harness.h"

namespace flashmoe::testing {
namespace {

using core::BFloat16;
using core::Float16;
using emulator::ByteRange;
using emulator::MatrixPlace;
using emulator::MmaType;
using emulator::WgmmaInstruction;
using emulator::WgmmaOperand;

template <typename Exception>
bool throws(const std::function<void()>& f) {
  try {
    f();
  } catch (const Exception&) {
    return true;
  }
  return false;
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": groupID = lane / 4,
// threadID_in_group = lane % 4. Lanes 0, 6 and 31 as that section's formulas give them.
void fragments_of_16_bits(uint64_t) {
  struct Row {
    int lane;
    MatrixPlace a[8];
    MatrixPlace b[4];
    MatrixPlace d[4];
  };
  const Row table[] = {
      {0,
       {{0, 0}, {0, 1}, {8, 0}, {8, 1}, {0, 8}, {0, 9}, {8, 8}, {8, 9}},
       {{0, 0}, {1, 0}, {8, 0}, {9, 0}},
       {{0, 0}, {0, 1}, {8, 0}, {8, 1}}},
      {6,
       {{1, 4}, {1, 5}, {9, 4}, {9, 5}, {1, 12}, {1, 13}, {9, 12}, {9, 13}},
       {{4, 1}, {5, 1}, {12, 1}, {13, 1}},
       {{1, 4}, {1, 5}, {9, 4}, {9, 5}}},
      {31,
       {{7, 6}, {7, 7}, {15, 6}, {15, 7}, {7, 14}, {7, 15}, {15, 14}, {15, 15}},
       {{6, 7}, {7, 7}, {14, 7}, {15, 7}},
       {{7, 6}, {7, 7}, {15, 6}, {15, 7}}},
  };
  for (const Row& row : table) {
    for (int i = 0; i < 8; ++i) {
      check(emulator::mma_a_place(MmaType::kBFloat16, row.lane, i / 2, i % 2) == row.a[i], "a");
    }
    for (int i = 0; i < 4; ++i) {
      check(emulator::mma_b_place(MmaType::kFloat16, row.lane, i / 2, i % 2) == row.b[i], "b");
      check(emulator::mma_d_place(row.lane, i) == row.d[i], "d");
    }
  }
}

// PTX ISA, "Matrix Fragments for mma.m16n8k8" (.tf32).
void fragments_of_tf32(uint64_t) {
  struct Row {
    int lane;
    MatrixPlace a[4];
    MatrixPlace b[2];
  };
  const Row table[] = {
      {0, {{0, 0}, {8, 0}, {0, 4}, {8, 4}}, {{0, 0}, {4, 0}}},
      {6, {{1, 2}, {9, 2}, {1, 6}, {9, 6}}, {{2, 1}, {6, 1}}},
      {31, {{7, 3}, {15, 3}, {7, 7}, {15, 7}}, {{3, 7}, {7, 7}}},
  };
  for (const Row& row : table) {
    for (int i = 0; i < 4; ++i) {
      check(emulator::mma_a_place(MmaType::kTf32, row.lane, i, 0) == row.a[i], "a");
    }
    for (int i = 0; i < 2; ++i) {
      check(emulator::mma_b_place(MmaType::kTf32, row.lane, i, 0) == row.b[i], "b");
    }
  }
}

// PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16", accumulator D.
void fragments_of_wgmma(uint64_t) {
  struct Row {
    int thread;
    int index;
    MatrixPlace place;
  };
  const Row table[] = {
      {0, 0, {0, 0}},    {0, 1, {0, 1}},     {0, 2, {8, 0}},    {0, 3, {8, 1}},
      {0, 4, {0, 8}},    {0, 127, {8, 249}}, {38, 0, {17, 4}},  {38, 3, {25, 5}},
      {38, 6, {25, 12}}, {127, 0, {55, 6}},  {127, 3, {63, 7}}, {127, 127, {63, 255}},
  };
  for (const Row& row : table) {
    check(emulator::wgmma_d_place(row.thread, row.index) == row.place, "d");
  }
  std::set<std::pair<int, int>> places;
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < 128; ++i) {
      const MatrixPlace place = emulator::wgmma_d_place(thread, i);
      check(place.row >= 0 && place.row < 64 && place.column >= 0 && place.column < 256, "range");
      places.insert({place.row, place.column});
    }
  }
  check(places.size() == 64 * 256, "every element is in one register");
}

// A register of random elements, whole numbers from -8 to 8.
uint32_t small_numbers(MmaType type, Random& random) {
  const auto number = [&] { return static_cast<float>(random.between(-8, 8)); };
  if (type == MmaType::kTf32) {
    return std::bit_cast<uint32_t>(number()) | static_cast<uint32_t>(random.between(0, 0x1fff));
  }
  const auto half = [&]() -> uint32_t {
    return type == MmaType::kBFloat16 ? cpu::from_float<BFloat16>(number()).bits
                                      : cpu::from_float<Float16>(number()).bits;
  };
  const uint32_t low = half();
  return low | half() << 16;
}

double element(MmaType type, uint32_t bits, int index) {
  if (type == MmaType::kTf32) return std::bit_cast<float>(bits & 0xffffe000u);
  const auto half = static_cast<uint16_t>(bits >> 16 * index);
  return type == MmaType::kBFloat16 ? cpu::to_float(BFloat16{half}) : cpu::to_float(Float16{half});
}

void warp_products(uint64_t seed) {
  Random random(seed);
  for (const MmaType type : {MmaType::kBFloat16, MmaType::kFloat16, MmaType::kTf32}) {
    emulator::WarpRegisters<float, 4> d;
    emulator::WarpRegisters<uint32_t, 4> a;
    emulator::WarpRegisters<uint32_t, 2> b;
    std::vector<std::vector<double>> a_matrix(16, std::vector<double>(16));
    std::vector<std::vector<double>> b_matrix(16, std::vector<double>(8));
    for (int lane = 0; lane < 32; ++lane) {
      for (float& x : d[size_t(lane)]) x = static_cast<float>(random.between(-100, 100));
      for (uint32_t& x : a[size_t(lane)]) x = small_numbers(type, random);
      for (uint32_t& x : b[size_t(lane)]) x = small_numbers(type, random);
      for (int e = 0; e < emulator::elements_per_register(type); ++e) {
        for (int i = 0; i < 4; ++i) {
          const MatrixPlace place = emulator::mma_a_place(type, lane, i, e);
          a_matrix[size_t(place.row)][size_t(place.column)] =
              element(type, a[size_t(lane)][size_t(i)], e);
        }
        for (int i = 0; i < 2; ++i) {
          const MatrixPlace place = emulator::mma_b_place(type, lane, i, e);
          b_matrix[size_t(place.row)][size_t(place.column)] =
              element(type, b[size_t(lane)][size_t(i)], e);
        }
      }
    }
    auto result = d;
    emulator::mma_warp(type, result, a, b);
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const MatrixPlace place = emulator::mma_d_place(lane, i);
        double want = d[size_t(lane)][size_t(i)];
        for (size_t k = 0; k < size_t(emulator::mma_depth(type)); ++k) {
          want += a_matrix[size_t(place.row)][k] * b_matrix[k][size_t(place.column)];
        }
        check(result[size_t(lane)][size_t(i)] == want, "d += a b");
      }
    }
  }
}

// Of 1 + 3/4 of its last bit the nearest float is the next one; a tensor core gives 1.
void sums_are_cut(uint64_t) {
  for (const MmaType type : {MmaType::kBFloat16, MmaType::kFloat16, MmaType::kTf32}) {
    const auto bits = [&](float x) -> uint32_t {
      if (type == MmaType::kTf32) return std::bit_cast<uint32_t>(x);
      return type == MmaType::kBFloat16 ? cpu::from_float<BFloat16>(x).bits
                                        : cpu::from_float<Float16>(x).bits;
    };
    for (const float sign : {1.0f, -1.0f}) {
      emulator::WarpRegisters<float, 4> d{};
      emulator::WarpRegisters<uint32_t, 4> a{};
      emulator::WarpRegisters<uint32_t, 2> b{};
      d[0][0] = sign;
      a[0][0] = bits(sign * 0x1.8p-12f);
      b[0][0] = bits(0x1p-12f);
      emulator::mma_warp(type, d, a, b);
      check(d[0][0] == sign, "towards 0");
    }
  }
}

// PTX ISA, `ldmatrix`: lane i holds columns 2 * (i % 4) and the next of row i / 4; transposed, of
// the transposed matrix. Element (r, c) of matrix m is 100 * m + 10 * r + c.
void ldmatrix(uint64_t) {
  uint16_t values[4][8][8];
  std::array<const std::byte*, 32> rows;
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int row = 0; row < 8; ++row) {
      for (int column = 0; column < 8; ++column) {
        values[matrix][row][column] = static_cast<uint16_t>(100 * matrix + 10 * row + column);
      }
      rows[size_t(8 * matrix + row)] = reinterpret_cast<const std::byte*>(values[matrix][row]);
    }
  }
  const auto pair = [](uint32_t low, uint32_t high) { return low | high << 16; };
  const auto plain = emulator::ldmatrix_warp(rows, false);
  check(plain[0][0] == pair(0, 1), "lane 0");
  check(plain[6][1] == pair(114, 115), "lane 6");
  check(plain[31][3] == pair(376, 377), "lane 31");
  const auto transposed = emulator::ldmatrix_warp(rows, true);
  check(transposed[0][0] == pair(0, 10), "lane 0, transposed");
  check(transposed[6][1] == pair(141, 151), "lane 6, transposed");
  check(transposed[31][3] == pair(367, 377), "lane 31, transposed");
}

constexpr uint64_t descriptor(uint64_t start, uint64_t leading, uint64_t stride) {
  return uint64_t{1} << 62 | stride >> 4 << 32 | leading >> 4 << 16 | start >> 4;
}

// PTX ISA, "Matrix Descriptor Format" and "Canonical Layouts": with the 128-byte swizzle and 16-bit
// elements (T = 8), K-major ((8,m),(8,2k)):((64,SBO),(1,8)), MN-major
// ((8,8,m),(8,k)):((1,8,LBO),(64,SBO)), then Swizzle<3,4,3>: bits 4 to 6 of the address are
// exclusive-ored with bits 7 to 9.
void descriptors(uint64_t) {
  const WgmmaOperand operand = WgmmaOperand::decode(descriptor(0x2040, 0x4000, 0x400));
  check(operand.start == 0x2040 && operand.leading_bytes == 0x4000 && operand.stride_bytes == 0x400,
        "fields");
  check(throws<std::invalid_argument>([] { WgmmaOperand::decode(descriptor(0, 16, 1024) << 1); }),
        "another swizzle");
  check(throws<std::invalid_argument>(
            [] { WgmmaOperand::decode(descriptor(0, 16, 1024) | uint64_t{3} << 49); }),
        "a base offset");

  struct Row {
    uint32_t start;
    int row_or_column;
    int depth;
    bool transposed;
    uint32_t offset;
  };
  const Row table[] = {
      // K-major, 8 rows of 128 bytes and then SBO = 1024.
      {0, 0, 0, false, 0},
      {0, 0, 9, false, 18},
      {0, 1, 0, false, 128 + 16},
      {0, 1, 8, false, 128},
      {0, 7, 8, false, 7 * 128 + 6 * 16},
      {0, 8, 0, false, 1024},
      {0, 63, 15, false, 7 * 1024 + 7 * 128 + 6 * 16 + 14},
      // The second 16 of depth begin 32 bytes on, and their swizzle is that of the address.
      {32, 1, 0, false, 128 + 3 * 16},
      {96, 7, 15, false, 7 * 128 + 0 * 16 + 14},
      // MN-major, 64 columns of a depth in 128 bytes, LBO = 8192 to the next 64, SBO = 1024 to the
      // next 8 depths.
      {0, 1, 0, true, 2},
      {0, 8, 0, true, 16},
      {0, 0, 1, true, 128 + 16},
      {0, 8, 1, true, 128},
      {0, 63, 7, true, 7 * 128 + 14},
      {0, 64, 0, true, 8192},
      {2048, 130, 9, true, 2048 + 2 * 8192 + 1024 + 128 + 16 + 4},
  };
  for (const Row& row : table) {
    const WgmmaOperand at =
        WgmmaOperand::decode(descriptor(row.start, row.transposed ? 8192 : 16, 1024));
    check(at.offset(row.row_or_column, row.depth, row.transposed) == row.offset,
          "offset of " + std::to_string(row.row_or_column) + ", " + std::to_string(row.depth) +
              " is " + std::to_string(at.offset(row.row_or_column, row.depth, row.transposed)));
  }
}

// a in 64 lines of 128 bytes at 32768, 48 elements deep in, and b in chunks of 64 columns before.
constexpr uint32_t kRowsStart = 32768;

WgmmaInstruction instruction_of(MmaType type, int columns) {
  return {type,  columns, descriptor(kRowsStart + 96, 16, 1024), descriptor(2048, 8192, 1024),
          false, true};
}

void wgmma_reads(uint64_t) {
  const std::vector<ByteRange> reads =
      emulator::wgmma_reads(instruction_of(MmaType::kBFloat16, 128));
  check(reads[0] == ByteRange{2048, 4096}, "first 64 columns");
  check(reads[1] == ByteRange{2048 + 8192, 4096 + 8192}, "next 64 columns");
  // Pieces 6 and 7 of row r are at 6 ^ r and 7 ^ r.
  check(reads[2] == ByteRange{kRowsStart + 96, kRowsStart + 128}, "row 0");
  check(reads[3] == ByteRange{kRowsStart + 128 + 96, kRowsStart + 256}, "row 1");
  check(reads[4] == ByteRange{kRowsStart + 256 + 64, kRowsStart + 256 + 96}, "row 2");
  size_t bytes = 0;
  for (const ByteRange& range : reads) bytes += range.end - range.begin;
  check(bytes == (64 + 128) * 16 * 2, "all of both operands and nothing else");
}

// The operands of a warpgroup's product, written as TMA writes them.
void warpgroup_products(uint64_t seed) {
  Random random(seed);
  for (const MmaType type : {MmaType::kBFloat16, MmaType::kFloat16}) {
    for (const int columns : {8, 128, 256}) {
      std::vector<std::byte> shared(kRowsStart + 64 * 128);
      for (size_t i = 0; i < shared.size(); i += 4) {
        const uint32_t bits = small_numbers(type, random);
        std::memcpy(&shared[i], &bits, 4);
      }
      const auto at = [&](uint32_t line_start, int line, int index) {
        const int piece = (index / 8) ^ (line % 8);
        uint16_t bits;
        std::memcpy(&bits, &shared[line_start + uint32_t(line * 128 + piece * 16 + index % 8 * 2)],
                    2);
        return element(type, bits, 0);
      };
      std::vector<float> d(64 * size_t(columns));
      for (float& x : d) x = static_cast<float>(random.between(-100, 100));
      std::vector<float> result = d;
      const WgmmaInstruction instruction = instruction_of(type, columns);
      emulator::wgmma_multiply(instruction, shared, result.data());
      for (int i = 0; i < 64; ++i) {
        for (int j = 0; j < columns; ++j) {
          double want = d[size_t(i * columns + j)];
          for (int k = 0; k < 16; ++k) {
            want += at(kRowsStart, i, 48 + k) * at(uint32_t(j / 64) * 8192, 16 + k, j % 64);
          }
          check(result[size_t(i * columns + j)] == want, "d += a b");
        }
      }

      std::vector<float> registers(128 * size_t(columns) / 2);
      std::array<float*, 128> threads;
      for (size_t i = 0; i < 128; ++i) threads[i] = &registers[i * size_t(columns) / 2];
      emulator::wgmma_scatter(columns, result.data(), threads);
      check(threads[38][3] == result[size_t(25 * columns + 5)], "scatter");
      std::vector<float> gathered(result.size());
      emulator::wgmma_gather(columns, threads, gathered.data());
      check(gathered == result, "gather after scatter");

      // The last row's two pieces are the first ones of its line.
      shared.resize(kRowsStart + 63 * 128 + 31);
      check(throws<std::out_of_range>(
                [&] { emulator::wgmma_multiply(instruction, shared, result.data()); }),
            "the last byte is needed");
    }
  }
}

template <typename Engine>
void engine_multiplies(uint64_t seed) {
  const double error = engine_error<Engine>(seed);
  check(error <= 1, "error is " + std::to_string(error) + " of what is allowed");
}

// One product of tf32 is outside the bound of fp32, which shows that the bound is one.
void one_tf32_product_is_less_exact(uint64_t seed) {
  using Engine = cuda::Sm80Engine<float, 64, cuda::FloatProduct::kTf32>;
  check(engine_error<Engine>(seed) > 1, "not as exact as fp32");
  check(engine_error<Engine>(seed, allowed_tf32_error) <= 1, "but as two rounded factors are");
}

// The emulator's report on a wrong engine contains `part`.
template <typename WrongEngine>
Case reported_case(const std::string& name, const std::string& part) {
  return {name, [part](uint64_t seed) {
            Random random(seed);
            const Operands<BFloat16> operands(random, WrongEngine::kBlockRows, 1, 512, 64);
            std::vector<cuda::Product> products = edge_products<WrongEngine>(operands);
            products.resize(1);
            std::string report = "nothing";
            try {
              results_of<WrongEngine>(operands, products, seed);
            } catch (const emulator::Failure& failure) {
              report = failure.what();
            }
            check_contains(report, {part});
          }};
}

template <typename Engine>
Case engine_case(const std::string& name) {
  return {name, engine_multiplies<Engine>};
}

}  // namespace

std::vector<Case> tensor_core_cases() {
  using cuda::Sm80Engine;
  using cuda::Sm90Engine;
  return {
      {"fragments of 16-bit elements", fragments_of_16_bits},
      {"fragments of tf32", fragments_of_tf32},
      {"fragments of wgmma", fragments_of_wgmma},
      {"warp products", warp_products},
      {"warp products: sums are cut", sums_are_cut},
      {"ldmatrix", ldmatrix},
      {"wgmma descriptors", descriptors},
      {"what wgmma reads", wgmma_reads},
      {"warpgroup products", warpgroup_products},
      engine_case<Sm90Engine<BFloat16, 128>>("Sm90Engine, bf16, 128 rows"),
      engine_case<Sm90Engine<Float16, 64>>("Sm90Engine, f16, 64 rows"),
      engine_case<Sm80Engine<BFloat16, 128>>("Sm80Engine, bf16, 128 rows"),
      engine_case<Sm80Engine<Float16, 64>>("Sm80Engine, f16, 64 rows"),
      engine_case<Sm80Engine<float, 128>>("Sm80Engine, float, 128 rows"),
      engine_case<Sm80Engine<float, 64>>("Sm80Engine, float, 64 rows"),
      reported_case<ReleasesEarly>("a stage released while wgmma reads it is reported",
                                   "stage reused early"),
      reported_case<ReadsEarly>("a stage read before it is full is reported", "of shared memory"),
      {"one tf32 product is less exact", one_tf32_product_is_less_exact},
  };
}

}  // namespace flashmoe::testing
