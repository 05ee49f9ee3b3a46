#include "kernels/emulator/tensor_core.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels/core/types.h"
#include "kernels/cpu/storage.h"

namespace flashmoe::emulator {
namespace {

constexpr int kRows = 64;   // of a wgmma
constexpr int kDepth = 16;  // of a wgmma of a 16-bit type
constexpr int kMaxColumns = 256;
constexpr int kPieceBytes = 16;
constexpr int kPieceElements = 8;  // of 16 bits
constexpr uint32_t kAddressableBytes = 1u << 18;

float half_to_float(MmaType type, uint16_t bits) {
  return type == MmaType::kBFloat16 ? cpu::to_float(core::BFloat16{bits})
                                    : cpu::to_float(core::Float16{bits});
}

// Element 0 or 1 of a register.
float element_of(MmaType type, uint32_t bits, int element) {
  if (type == MmaType::kTf32) return std::bit_cast<float>(bits & ~0x1fffu);
  return half_to_float(type, static_cast<uint16_t>(bits >> (16 * element)));
}

// x without the bits that do not fit a float.
float cut(double x) {
  const float nearest = static_cast<float>(x);
  const bool beyond = std::abs(double{nearest}) > std::abs(x);
  return beyond ? std::bit_cast<float>(std::bit_cast<uint32_t>(nearest) - 1) : nearest;
}

void check_inside(uint32_t offset, size_t shared_bytes) {
  if (size_t{offset} + kPieceBytes > shared_bytes) {
    throw std::out_of_range("wgmma reads shared memory at " + std::to_string(offset) +
                            ", beyond its " + std::to_string(shared_bytes) + " bytes");
  }
}

// The 8 elements of a row or column `line` from depth `piece * 8` on; if transposed, of a depth
// `line` from row or column `piece * 8` on.
uint32_t piece_offset(const WgmmaOperand& operand, int line, int piece, bool transposed) {
  return transposed ? operand.offset(piece * kPieceElements, line, true)
                    : operand.offset(line, piece * kPieceElements, false);
}

// Calls f(line, piece, offset) for all 16-byte pieces of an operand of `extent` rows or columns.
// A line is a row or column, or a depth if transposed.
template <typename F>
void for_each_piece(const WgmmaOperand& operand, int extent, bool transposed, F f) {
  const int lines = transposed ? kDepth : extent;
  const int pieces = (transposed ? extent : kDepth) / kPieceElements;
  for (int line = 0; line < lines; ++line) {
    for (int piece = 0; piece < pieces; ++piece) {
      f(line, piece, piece_offset(operand, line, piece, transposed));
    }
  }
}

// Decodes an operand to floats: element (row or column i, depth k) to
// values[i * extent_stride + k * depth_stride].
void decode_operand(MmaType type, uint64_t descriptor, int extent, bool transposed,
                    std::span<const std::byte> shared, float* values, int extent_stride,
                    int depth_stride) {
  const WgmmaOperand operand = WgmmaOperand::decode(descriptor);
  const int line_stride = transposed ? depth_stride : extent_stride;
  const int element_stride = transposed ? extent_stride : depth_stride;
  for_each_piece(operand, extent, transposed, [&](int line, int piece, uint32_t offset) {
    check_inside(offset, shared.size());
    uint16_t bits[kPieceElements];
    std::memcpy(bits, shared.data() + offset, kPieceBytes);
    float* to = values + line * line_stride + piece * kPieceElements * element_stride;
    for (int i = 0; i < kPieceElements; ++i) to[i * element_stride] = half_to_float(type, bits[i]);
  });
}

// d[0 .. kBlock) += sum over the depth of a[k] * b[k][0 .. kBlock); the block stays in registers.
template <int kBlock>
void multiply_block(const float* a, const float* b, int columns, float* d) {
  float sums[kBlock];
  for (int j = 0; j < kBlock; ++j) sums[j] = d[j];
  for (int k = 0; k < kDepth; ++k) {
    const float factor = a[k];
    const float* line = b + k * columns;
    for (int j = 0; j < kBlock; ++j) sums[j] += factor * line[j];
  }
  for (int j = 0; j < kBlock; ++j) d[j] = sums[j];
}

// Calls f(thread, index, offset) for every second accumulator of all threads: it and the next one
// are elements `offset` and `offset + 1` of d.
template <typename F>
void for_each_pair(int columns, F f) {
  for (int thread = 0; thread < 128; ++thread) {
    const MatrixPlace first = wgmma_d_place(thread, 0);
    const int offset = first.row * columns + first.column;
    for (int j = 0; j < columns / 8; ++j) {
      f(thread, 4 * j, offset + 8 * j);
      f(thread, 4 * j + 2, offset + 8 * columns + 8 * j);
    }
  }
}

void check_instruction(const WgmmaInstruction& instruction) {
  if (instruction.type == MmaType::kTf32) {
    throw std::invalid_argument("wgmma of tf32 is not known to the emulator");
  }
  if (instruction.columns % 8 != 0 || instruction.columns < 8 ||
      instruction.columns > kMaxColumns) {
    throw std::invalid_argument("wgmma has no shape of " + std::to_string(instruction.columns) +
                                " columns");
  }
}

}  // namespace

MatrixPlace mma_a_place(MmaType type, int lane, int index, int element) {
  const int width = elements_per_register(type);
  return {lane / 4 + 8 * (index % 2), width * (lane % 4) + 4 * width * (index / 2) + element};
}

MatrixPlace mma_b_place(MmaType type, int lane, int index, int element) {
  const int width = elements_per_register(type);
  return {width * (lane % 4) + 4 * width * index + element, lane / 4};
}

MatrixPlace mma_d_place(int lane, int index) {
  return {lane / 4 + 8 * (index / 2), 2 * (lane % 4) + index % 2};
}

MatrixPlace wgmma_d_place(int thread, int index) {
  const MatrixPlace place = mma_d_place(thread % 32, index % 4);
  return {16 * (thread / 32) + place.row, 8 * (index / 4) + place.column};
}

namespace {

// Of a type known to the compiler, which then knows the places.
template <MmaType kType>
void mma_warp_of(WarpRegisters<float, 4>& d, const WarpRegisters<uint32_t, 4>& a,
                 const WarpRegisters<uint32_t, 2>& b) {
  constexpr int kMmaDepth = mma_depth(kType), kAtOnce = kMmaDepth / 2;
  double a_values[16][kMmaDepth];
  double b_values[kMmaDepth][8];
  double sums[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    for (int element = 0; element < elements_per_register(kType); ++element) {
      for (int i = 0; i < 4; ++i) {
        const MatrixPlace place = mma_a_place(kType, lane, i, element);
        a_values[place.row][place.column] = element_of(kType, a[lane][i], element);
      }
      for (int i = 0; i < 2; ++i) {
        const MatrixPlace place = mma_b_place(kType, lane, i, element);
        b_values[place.row][place.column] = element_of(kType, b[lane][i], element);
      }
    }
    for (int i = 0; i < 4; ++i) {
      const MatrixPlace place = mma_d_place(lane, i);
      sums[place.row][place.column] = d[lane][i];
    }
  }
  for (int i = 0; i < 16; ++i) {
    double row[8];  // stays in registers
    for (int j = 0; j < 8; ++j) row[j] = sums[i][j];
    for (int first = 0; first < kMmaDepth; first += kAtOnce) {
      for (int k = first; k < first + kAtOnce; ++k) {
        const double factor = a_values[i][k];
        for (int j = 0; j < 8; ++j) row[j] += factor * b_values[k][j];
      }
      for (int j = 0; j < 8; ++j) row[j] = cut(row[j]);
    }
    for (int j = 0; j < 8; ++j) sums[i][j] = row[j];
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const MatrixPlace place = mma_d_place(lane, i);
      d[lane][i] = static_cast<float>(sums[place.row][place.column]);
    }
  }
}

}  // namespace

void mma_warp(MmaType type, WarpRegisters<float, 4>& d, const WarpRegisters<uint32_t, 4>& a,
              const WarpRegisters<uint32_t, 2>& b) {
  switch (type) {
    case MmaType::kBFloat16:
      return mma_warp_of<MmaType::kBFloat16>(d, a, b);
    case MmaType::kFloat16:
      return mma_warp_of<MmaType::kFloat16>(d, a, b);
    case MmaType::kTf32:
      return mma_warp_of<MmaType::kTf32>(d, a, b);
  }
}

WarpRegisters<uint32_t, 4> ldmatrix_warp(const std::array<const std::byte*, 32>& rows,
                                         bool transpose) {
  WarpRegisters<uint32_t, 4> r;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t values[8][8];
    for (int row = 0; row < 8; ++row) std::memcpy(values[row], rows[8 * matrix + row], 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int line = lane / 4;
      const int pair = 2 * (lane % 4);
      const uint32_t low = transpose ? values[pair][line] : values[line][pair];
      const uint32_t high = transpose ? values[pair + 1][line] : values[line][pair + 1];
      r[lane][matrix] = low | high << 16;
    }
  }
  return r;
}

WgmmaOperand WgmmaOperand::decode(uint64_t descriptor) {
  const auto field = [&](int low) {
    return static_cast<uint32_t>(descriptor >> low & 0x3fff) * kPieceBytes;
  };
  if (descriptor >> 62 != 1) {
    throw std::invalid_argument("wgmma descriptor without the 128-byte swizzle");
  }
  if ((descriptor >> 49 & 7) != 0) {
    throw std::invalid_argument("wgmma descriptor with a base offset");
  }
  return {field(0), field(16), field(32)};
}

uint32_t WgmmaOperand::offset(int row_or_column, int depth, bool transposed) const {
  const auto x = static_cast<uint32_t>(row_or_column);
  const auto k = static_cast<uint32_t>(depth);
  const uint32_t linear =
      transposed ? x / 64 * leading_bytes + k / 8 * stride_bytes + k % 8 * 128 + x % 64 * 2
                 : x / 8 * stride_bytes + x % 8 * 128 + k * 2;
  const uint32_t address = start + linear;
  // The swizzle is one of addresses, whatever the start.
  return address ^ (address >> 7 & 7) << 4;
}

std::vector<ByteRange> wgmma_reads(const WgmmaInstruction& instruction) {
  check_instruction(instruction);
  std::array<uint64_t, kAddressableBytes / kPieceBytes / 64> pieces{};
  const auto mark = [&](int, int, uint32_t offset) {
    check_inside(offset, kAddressableBytes);
    const uint32_t piece = offset / kPieceBytes;
    pieces[piece / 64] |= uint64_t{1} << piece % 64;
  };
  for_each_piece(WgmmaOperand::decode(instruction.a_descriptor), kRows, instruction.a_transposed,
                 mark);
  for_each_piece(WgmmaOperand::decode(instruction.b_descriptor), instruction.columns,
                 instruction.b_transposed, mark);

  std::vector<ByteRange> ranges;
  for (uint32_t word = 0; word < pieces.size(); ++word) {
    for (uint64_t bits = pieces[word]; bits != 0; bits &= bits - 1) {
      const uint32_t begin =
          (word * 64 + static_cast<uint32_t>(std::countr_zero(bits))) * kPieceBytes;
      if (!ranges.empty() && ranges.back().end == begin) {
        ranges.back().end += kPieceBytes;
      } else {
        ranges.push_back({begin, begin + kPieceBytes});
      }
    }
  }
  return ranges;
}

void wgmma_multiply(const WgmmaInstruction& instruction, std::span<const std::byte> shared,
                    float* d) {
  check_instruction(instruction);
  const int columns = instruction.columns;
  float a[kRows * kDepth];
  float b[kDepth * kMaxColumns];
  decode_operand(instruction.type, instruction.a_descriptor, kRows, instruction.a_transposed,
                 shared, a, kDepth, 1);
  decode_operand(instruction.type, instruction.b_descriptor, columns, instruction.b_transposed,
                 shared, b, 1, columns);
  for (int row = 0; row < kRows; ++row) {
    float* line = d + row * columns;
    int column = 0;
    for (; column + 32 <= columns; column += 32) {
      multiply_block<32>(a + row * kDepth, b + column, columns, line + column);
    }
    for (; column < columns; column += 8) {
      multiply_block<8>(a + row * kDepth, b + column, columns, line + column);
    }
  }
}

void wgmma_scatter(int columns, const float* d, std::span<float* const, 128> accumulators) {
  for_each_pair(columns, [&](int thread, int index, int offset) {
    float* to = accumulators[static_cast<size_t>(thread)] + index;
    to[0] = d[offset];
    to[1] = d[offset + 1];
  });
}

void wgmma_gather(int columns, std::span<float* const, 128> accumulators, float* d) {
  for_each_pair(columns, [&](int thread, int index, int offset) {
    const float* from = accumulators[static_cast<size_t>(thread)] + index;
    d[offset] = from[0];
    d[offset + 1] = from[1];
  });
}

}  // namespace flashmoe::emulator
