// Products of BFloat16 by the tile registers of AMX.
//
// Eight registers of up to 16 rows of 64 bytes: four sums (32 x 32 floats of c), two of op(a), two
// of op(b). One instruction adds the product of 16 rows of 32 elements and 16 pairs of rows of 16
// columns; the registers are configured to the rows and columns that c has, so no edge needs a
// copy.
#include <immintrin.h>

#include "kernels/cpu/simd/levels.h"
#include "kernels/cpu/simd/multiply.h"

namespace flashmoe::cpu::simd::amx {
namespace {

constexpr int kTile = 16;          // rows of a register, and its columns of 4 bytes
constexpr int kSide = 2 * kTile;   // rows and columns of c at a time
constexpr int kDepth = 2 * kTile;  // elements along k in one instruction
constexpr int64_t kPanelBytes = kSide * sizeof(Pair);

// The compiler does not know what tile instructions read and write.
inline void tile_memory_fence(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// The registers' shapes for rows x columns of c. Released at the end: a thread with live tiles has
// kilobytes more to save when it is interrupted.
class TileShapes {
 public:
  ~TileShapes() { _tile_release(); }

  void set(int64_t rows, int64_t columns) {
    if (rows == rows_ && columns == columns_) return;
    rows_ = rows;
    columns_ = columns;
    const int64_t upper = std::min<int64_t>(kTile, rows), left = std::min<int64_t>(kTile, columns);
    Config config;
    const auto shape = [&](int tile, int64_t tile_rows, int64_t tile_columns) {
      if (tile_rows == 0 || tile_columns == 0) return;
      config.rows[tile] = static_cast<uint8_t>(tile_rows);
      config.row_bytes[tile] = static_cast<uint16_t>(tile_columns * 4);
    };
    shape(0, upper, left);
    shape(1, upper, columns - left);
    shape(2, rows - upper, left);
    shape(3, rows - upper, columns - left);
    shape(4, upper, kTile);
    shape(5, rows - upper, kTile);
    shape(6, kTile, left);
    shape(7, kTile, columns - left);
    tile_memory_fence(&config);
    _tile_loadconfig(&config);
  }

 private:
  struct alignas(64) Config {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  int64_t rows_ = 0;
  int64_t columns_ = 0;
};

struct Input {
  const BFloat16* a;  // [rows][kDepth * steps]
  int64_t a_bytes;    // from row to row
  const Pair* panel;  // [kTile * steps][kSide]
  int64_t steps;
};

template <bool kLower, bool kRight>
void multiply_tiles(const Input& in, const TileOutput& out) {
  const int64_t c_bytes = out.stride * static_cast<int64_t>(sizeof(float));
  float* const upper = out.c;
  float* const lower = out.c + kTile * out.stride;
  if (out.from_zero) {
    _tile_zero(0);
    if constexpr (kRight) _tile_zero(1);
    if constexpr (kLower) _tile_zero(2);
    if constexpr (kLower && kRight) _tile_zero(3);
  } else {
    _tile_loadd(0, upper, c_bytes);
    if constexpr (kRight) _tile_loadd(1, upper + kTile, c_bytes);
    if constexpr (kLower) _tile_loadd(2, lower, c_bytes);
    if constexpr (kLower && kRight) _tile_loadd(3, lower + kTile, c_bytes);
  }
  const auto* a = reinterpret_cast<const char*>(in.a);
  const Pair* panel = in.panel;
  for (int64_t s = 0; s < in.steps; ++s) {
    _tile_loadd(4, a, in.a_bytes);
    _tile_loadd(6, panel, kPanelBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRight) {
      _tile_loadd(7, panel + kTile, kPanelBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kLower) {
      _tile_loadd(5, a + kTile * in.a_bytes, in.a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kLower && kRight) _tile_dpbf16ps(3, 5, 7);
    a += kDepth * sizeof(BFloat16);
    panel += kTile * kSide;
  }
  _tile_stored(0, upper, c_bytes);
  if constexpr (kRight) _tile_stored(1, upper + kTile, c_bytes);
  if constexpr (kLower) _tile_stored(2, lower, c_bytes);
  if constexpr (kLower && kRight) _tile_stored(3, lower + kTile, c_bytes);
}

// Rows k and k + 1 of op(b), up to kSide columns of them, side by side in pairs. A row of which the
// mask holds no column is zeros and not read.
inline void interleave(const BFloat16* row, __mmask32 row_mask, const BFloat16* next,
                       __mmask32 next_mask, Pair* to) {
  const __m512i even = _mm512_maskz_loadu_epi16(row_mask, row);
  const __m512i odd = _mm512_maskz_loadu_epi16(next_mask, next);
  // Within each quarter of a register; the permutations put the quarters in order.
  const __m512i low = _mm512_unpacklo_epi16(even, odd);
  const __m512i high = _mm512_unpackhi_epi16(even, odd);
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  store_as(_mm512_permutex2var_epi64(low, first, high), to);
  store_as(_mm512_permutex2var_epi64(low, second, high), to + kTile);
}

// Panels of kSide columns of the block, one after the other, `units` deep, zeros past the block's
// depth.
void pack_block(const Operand<BFloat16>& b, const Block& block, int64_t units, Pair* panels) {
  if (b.transpose == Transpose::kYes) {
    for (int64_t j = 0; j < block.columns; j += kSide) {
      pack_columns(at(b, block.k, block.column + j), b.stride, block.depth,
                   std::min<int64_t>(kSide, block.columns - j), panels + j * units, kSide);
    }
    return;
  }
  // In rectangles of eight rows and two lines of each, and with the rows sixteen further asked for:
  // of many orders tried, this one had the memory busiest.
  constexpr int64_t kUnits = 4, kColumns = 2 * kSide, kAhead = 16;
  for (int64_t u = 0; u < units; u += kUnits) {
    for (int64_t j = 0; j < block.columns; j += kColumns) {
      for (int64_t i = u; i < u + kUnits; ++i) {
        for (int64_t c = j; c < std::min(j + kColumns, block.columns); c += kSide) {
          const int64_t columns = std::min<int64_t>(kSide, block.columns - c);
          const auto mask = static_cast<__mmask32>(~0u >> (kSide - columns));
          const int64_t left = block.depth - 2 * i;
          const BFloat16* row = at(b, block.k + std::min(2 * i, block.depth), block.column + c);
          _mm_prefetch(row + kAhead * b.stride, _MM_HINT_T1);
          _mm_prefetch(row + (kAhead + 1) * b.stride, _MM_HINT_T1);
          interleave(row, left > 0 ? mask : 0, row + b.stride, left > 1 ? mask : 0,
                     panels + c * units + i * kSide);
        }
      }
    }
  }
}

// The block's part of op(a), row-major, `units` pairs long, zeros past the block's depth.
MatrixView<const BFloat16> factors_of(const Operand<BFloat16>& a, const Block& block,
                                      int64_t units) {
  const int64_t step = units + kTile;  // not a power of two, against cache conflicts
  const auto copy = [&] {
    return scratch<Pair>(Scratch::kFactors, round_up(block.rows, kTile) * step);
  };
  const auto view = [&](const Pair* to) {
    return MatrixView<const BFloat16>{reinterpret_cast<const BFloat16*>(to), 2 * step};
  };
  if (a.transpose == Transpose::kNo) {
    const BFloat16* from = a.data + block.row * a.stride + block.k;
    if (block.depth == 2 * units) return {from, a.stride};
    Pair* const to = copy();
    for (int64_t i = 0; i < block.rows; ++i) {
      for (int64_t u = 0; u < units; u += kTile) {
        store_as(load_along_k<Pair>(from + i * a.stride + 2 * u, block.depth - 2 * u),
                 to + i * step + u);
      }
    }
    return view(to);
  }
  Pair* const to = copy();
  for (int64_t i = 0; i < block.rows; i += kTile) {
    for (int64_t u = 0; u < units; u += kTile) {
      Words square[kTile];
      for (int64_t p = 0; p < kTile; ++p) {
        const int64_t left = block.depth - 2 * (u + p);
        const BFloat16* row = a.data + (block.k + 2 * (u + p)) * a.stride + block.row + i;
        square[p] =
            left > 0 ? load_across_k<Pair>(row, left > 1 ? row + a.stride : nullptr, block.rows - i)
                     : Words{};
      }
      transpose(square);
      for (int64_t r = 0; r < kTile; ++r) store_as(square[r], to + (i + r) * step + u);
    }
  }
  return view(to);
}

}  // namespace

void multiply(const Product<BFloat16>& p) {
  const Block sizes{0, 256, 0, 512, 0, 256};
  Pair* panels = scratch<Pair>(Scratch::kPanels, sizes.columns * sizes.depth / 2);
  TileShapes shapes;
  for_each_block(p, sizes, [&](const Block& block) {
    const int64_t steps = ceil_div(block.depth, kDepth), units = steps * kTile;
    pack_block(p.b, block, units, panels);
    const MatrixView<const BFloat16> a = factors_of(p.a, block, units);
    const MatrixView<float> result = result_of(p, block);
    tile_memory_fence(panels);
    for (int64_t i = 0; i < block.rows; i += kSide) {
      const int64_t rows = std::min<int64_t>(kSide, block.rows - i);
      for (int64_t j = 0; j < block.columns; j += kSide) {
        const int64_t columns = std::min<int64_t>(kSide, block.columns - j);
        shapes.set(rows, columns);
        const Input in{a.data + i * a.stride, a.stride * static_cast<int64_t>(sizeof(BFloat16)),
                       panels + j * units, steps};
        const TileOutput out{result.data + i * result.stride + j, result.stride,
                             block.k == 0 && !p.accumulate};
        if (rows > kTile) {
          columns > kTile ? multiply_tiles<true, true>(in, out)
                          : multiply_tiles<true, false>(in, out);
        } else {
          columns > kTile ? multiply_tiles<false, true>(in, out)
                          : multiply_tiles<false, false>(in, out);
        }
      }
      round_rows(p, block, i, rows);
    }
  });
}

}  // namespace flashmoe::cpu::simd::amx
