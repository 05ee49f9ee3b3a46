// The innermost part of a product: a few rows of op(a) times a panel of op(b), with the sums in
// registers.
#pragma once

#include "kernels/cpu/simd/panel.h"

namespace flashmoe::cpu::simd::FLASHMOE_SIMD_LEVEL {

// As many sums as fit into the registers beside one row of the panel and one factor: enough
// independent multiply-adds to hide their latency, and few loads for each.
inline constexpr int kTileVectors = kRegisters == 32 ? 4 : 2;
inline constexpr int kTileRows = kRegisters == 32 || kLanes == 8 ? 6 : 4;
inline constexpr int kTileColumns = kTileVectors * kLanes;

// With one rounding where the instruction set can. Left to the compiler that would depend on the
// size of the tile: recent versions of GCC do not fuse short chains of 256-bit sums.
inline Vector multiply_add(Vector sum, float a, Vector b) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(_mm512_set1_ps(a), b, sum);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(_mm256_set1_ps(a), b, sum);
#else
  return sum + a * b;
#endif
}
#if defined(__AVX512BF16__)
inline Vector multiply_add(Vector sum, Pair a, Words b) {
  return _mm512_dpbf16_ps(sum, __builtin_bit_cast(__m512bh, Words{} + a),
                          __builtin_bit_cast(__m512bh, b));
}
#endif

// Lines that a later tile will read, in rows `stride` bytes apart. A tile asks for one of them, and
// for the one `second` bytes further, in every kStep units along k: memory then works while the
// arithmetic does. Asked for all at once, they would keep the tile's own loads waiting.
struct Ahead {
  static constexpr int kStep = 4;

  const void* line;
  int64_t stride;
  int64_t second;
};

template <typename Unit>
struct TileInput {
  const Unit* a;  // the factor of row i and unit p is a[i * row_step + p * unit_step]
  int64_t row_step;
  int64_t unit_step;
  Unit* panel;  // [units][width of the tile]
  int64_t units;
};

struct TileOutput {
  float* c;
  int64_t stride;
  bool from_zero;  // else the sums begin with c
};

template <typename Unit, int kRows, int kVectors>
struct Sums {
  Vector at[kRows][kVectors];

  void begin(const TileOutput& out) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        at[i][v] = out.from_zero ? Vector{} : load(out.c + i * out.stride + v * kLanes);
      }
    }
  }
  void add(const Unit* a, int64_t row_step, const UnitVector<Unit> (&b)[kVectors]) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Unit factor = a[i * row_step];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) at[i][v] = multiply_add(at[i][v], factor, b[v]);
    }
  }
  void end(const TileOutput& out) const {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store(at[i][v], out.c + i * out.stride + v * kLanes);
    }
  }
};

template <typename Unit, int kRows, int kVectors>
[[gnu::noinline]] void multiply_panel(const TileInput<Unit>& in, const Ahead& ahead,
                                      const TileOutput& out) {
  Sums<Unit, kRows, kVectors> sums;
  sums.begin(out);
  const Unit* a = in.a;
  const Unit* panel = in.panel;
  const int64_t row_step = in.row_step, unit_step = in.unit_step;
  const auto step = [&] {
    UnitVector<Unit> b[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) b[v] = load_as<UnitVector<Unit>>(panel + v * kLanes);
    sums.add(a, row_step, b);
    a += unit_step;
    panel += kVectors * kLanes;
  };
  const char* line = static_cast<const char*>(ahead.line);
  int64_t p = 0;
  for (; p + Ahead::kStep <= in.units; p += Ahead::kStep, line += ahead.stride) {
    __builtin_prefetch(line, 0, 2);
    __builtin_prefetch(line + ahead.second, 0, 2);
#pragma GCC unroll 4
    for (int i = 0; i < Ahead::kStep; ++i) step();
  }
  for (; p < in.units; ++p) step();
  sums.end(out);
}

// The same from the rows of op(b) themselves, `depth` of them; fills the panel on the way. So the
// first tile of a panel packs it almost for free, and a product of few rows reads op(b) just once.
template <typename Unit, int kRows, typename S>
[[gnu::noinline]] void multiply_rows(const TileInput<Unit>& in, MatrixView<const S> b,
                                     int64_t depth, const TileOutput& out) {
  Sums<Unit, kRows, kTileVectors> sums;
  sums.begin(out);
  const Unit* a = in.a;
  Unit* panel = in.panel;
  const int64_t row_step = in.row_step, unit_step = in.unit_step;
  const auto step = [&](const S* row, const S* next) {
    // Rows further on, which the CPU does not foresee where each lies in another page.
    constexpr int kAhead = 8, kLine = 64 / sizeof(S);
#pragma GCC unroll 8
    for (int at = 0; at < kTileColumns; at += kLine) {
      __builtin_prefetch(row + kAhead * b.stride + at, 0, 2);
    }
    UnitVector<Unit> units[kTileVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
      const int at = v * kLanes;
      units[v] = load_across_k<Unit>(row + at, next == nullptr ? nullptr : next + at, kLanes);
      store_as(units[v], panel + at);
    }
    sums.add(a, row_step, units);
    a += unit_step;
    panel += kTileColumns;
  };
  constexpr int kDepth = kUnitDepth<Unit>;
  const S* row = b.data;
  int64_t left = depth;
  for (; left >= kDepth; left -= kDepth, row += kDepth * b.stride) step(row, row + b.stride);
  if (left > 0) step(row, nullptr);
  sums.end(out);
}

// f.operator()<rows>() for 1 <= rows <= kTileRows.
template <typename F>
inline void with_rows(int64_t rows, F f) {
  switch (rows) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
    case 5:
      return f.template operator()<std::min(5, kTileRows)>();
    default:
      return f.template operator()<kTileRows>();
  }
}
// The same for 1 <= vectors <= kTileVectors.
template <typename F>
inline void with_vectors(int64_t vectors, F f) {
  switch (vectors) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<std::min(3, kTileVectors)>();
    default:
      return f.template operator()<kTileVectors>();
  }
}

}  // namespace flashmoe::cpu::simd::FLASHMOE_SIMD_LEVEL
