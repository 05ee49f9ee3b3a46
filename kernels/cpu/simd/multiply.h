// Products by vector multiply-adds: how they are cut into blocks, panels and tiles.
#pragma once

#include "kernels/cpu/simd/scratch.h"
#include "kernels/cpu/simd/tile.h"

namespace flashmoe::cpu::simd::FLASHMOE_SIMD_LEVEL {

template <typename T>
inline T* scratch(Scratch kind, int64_t count) {
  return static_cast<T*>(reserve_scratch(kind, count * static_cast<int64_t>(sizeof(T))));
}

// Part of a product. The blocks of k follow each other innermost, so that c stays in the cache.
struct Block {
  int64_t row, rows;
  int64_t column, columns;
  int64_t k, depth;
};

// Cuts `total` into equal parts, all but the last a multiple of `unit`, of at most `most` each.
inline int64_t equal_parts(int64_t total, int64_t most, int64_t unit) {
  const int64_t parts = std::max<int64_t>(ceil_div(total, most), 1);
  return round_up(std::max<int64_t>(ceil_div(total, parts), 1), unit);
}

// Calls f(block) for all blocks of a product: of each column block all row blocks, of each of these
// all of k. `sizes` holds the largest rows, columns and depth of a block. Equal bits for all sizes:
// sums of k blocks continue in c.
template <typename S, typename F>
inline void for_each_block(const Product<S>& p, const Block& sizes, F f) {
  const int64_t rows = equal_parts(p.m, sizes.rows, 1);
  const int64_t depth = equal_parts(p.k, sizes.depth, 32);
  for (int64_t j = 0; j < p.n; j += sizes.columns) {
    for (int64_t i = 0; i < p.m; i += rows) {
      Block block{i, std::min(rows, p.m - i), j, std::min(sizes.columns, p.n - j), 0, 0};
      do {
        block.depth = std::min(depth, p.k - block.k);
        f(block);
        block.k += block.depth;
      } while (block.k < p.k);
    }
  }
}

// Where op(b) has element (k, column).
template <typename S>
inline const S* at(const Operand<S>& b, int64_t k, int64_t column) {
  return b.transpose == Transpose::kYes ? b.data + column * b.stride + k
                                        : b.data + k * b.stride + column;
}

// The result of the block in floats: in c, or on its way to `rounded`.
template <typename S>
inline MatrixView<float> result_of(const Product<S>& p, const Block& block) {
  if (p.rounded.data == nullptr) {
    return {p.c.data + block.row * p.c.stride + block.column, p.c.stride};
  }
  return {scratch<float>(Scratch::kResult, block.rows * block.columns), block.columns};
}

// To be called for all rows of every block: rounds them when their sums are complete.
template <typename S>
inline void round_rows(const Product<S>& p, const Block& block, int64_t first, int64_t count) {
  if (p.rounded.data == nullptr || block.k + block.depth < p.k) return;
  const MatrixView<float> from = result_of(p, block);
  for (int64_t i = first; i < first + count; ++i) {
    S* to = p.rounded.data + (block.row + i) * p.rounded.stride + block.column;
    for (int64_t j = 0; j < block.columns; j += kLanes) {
      store(load(from.data + i * from.stride + j, block.columns - j), to + j, block.columns - j);
    }
  }
}

template <typename Unit>
struct Factors {
  const Unit* data;
  int64_t row_step;
  int64_t unit_step;
};

// The block's part of op(a) as units: itself, or a copy. A transposed one is copied too: its
// columns lie in as many pages as the block is deep.
template <typename Unit, typename S>
inline Factors<Unit> factors_of(const Operand<S>& a, const Block& block) {
  constexpr int kDepth = kUnitDepth<Unit>;
  constexpr int64_t kPadding = 16;  // rows a power of two apart would contend for the cache
  const int64_t units = ceil_div(block.depth, kDepth);
  if (a.transpose == Transpose::kNo) {
    const S* from = a.data + block.row * a.stride + block.k;
    if constexpr (std::is_same_v<S, Unit>) {
      return {from, a.stride, 1};
    } else {
      const int64_t step = round_up(units, kLanes) + kPadding;
      Unit* to = scratch<Unit>(Scratch::kFactors, block.rows * step);
      for (int64_t i = 0; i < block.rows; ++i) {
        for (int64_t u = 0; u < units; u += kLanes) {
          store_as(load_along_k<Unit>(from + i * a.stride + u * kDepth, block.depth - u * kDepth),
                   to + i * step + u);
        }
      }
      return {to, step, 1};
    }
  }
  const int64_t step = round_up(block.rows, kLanes) + kPadding;
  Unit* to = scratch<Unit>(Scratch::kFactors, units * step);
  pack_rows(a.data + block.k * a.stride + block.row, a.stride, block.depth, block.rows, to, step);
  return {to, 1, step};
}

// The panel that follows, while its lines are being asked for.
class NextPanel {
 public:
  // Nothing follows: asks for a line that is at hand.
  explicit NextPanel(const void* at_hand) : data_(static_cast<const char*>(at_hand)) {}

  template <typename S>
  NextPanel(const Operand<S>& b, int64_t k, int64_t depth, int64_t column, int64_t columns)
      : data_(reinterpret_cast<const char*>(at(b, k, column))),
        stride_(b.stride * static_cast<int64_t>(sizeof(S))) {
    const bool transposed = b.transpose == Transpose::kYes;
    rows_ = transposed ? columns : depth;
    bytes_ = (transposed ? depth : columns) * static_cast<int64_t>(sizeof(S));
  }

  // The share of a tile of so many units; two lines in a row if there are few tiles.
  Ahead take(int64_t units, bool few_tiles) {
    if (row_ >= rows_) return {data_, 0, 0};
    const Ahead ahead{data_ + row_ * stride_ + byte_, stride_, few_tiles ? kLine : 0};
    byte_ += few_tiles ? 2 * kLine : kLine;
    if (byte_ >= bytes_) {
      byte_ = 0;
      row_ += units / Ahead::kStep;
    }
    return ahead;
  }

 private:
  static constexpr int64_t kLine = 64;

  const char* data_;
  int64_t stride_ = 0;
  int64_t rows_ = 0;
  int64_t bytes_ = 0;
  int64_t row_ = 0;
  int64_t byte_ = 0;
};

// All rows of a block times one panel of `columns` columns.
template <typename Unit, typename S>
inline void multiply_by_panel(const Product<S>& p, const Block& block, const Factors<Unit>& a,
                              int64_t column, int64_t columns, NextPanel next, Unit* panel,
                              MatrixView<float> result) {
  const S* b = at(p.b, block.k, block.column + column);
  const int64_t vectors = ceil_div(columns, kLanes), width = vectors * kLanes;
  const int64_t units = ceil_div(block.depth, kUnitDepth<Unit>);
  const bool from_rows = p.b.transpose == Transpose::kNo && columns == kTileColumns;
  if (p.b.transpose == Transpose::kYes) {
    pack_columns(b, p.b.stride, block.depth, columns, panel, width);
  } else if (!from_rows) {
    pack_rows(b, p.b.stride, block.depth, columns, panel, width);
  }

  const int64_t tiles = ceil_div(block.rows, kTileRows);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = block.rows * t / tiles, rows = block.rows * (t + 1) / tiles - row;
    const TileInput<Unit> in{a.data + row * a.row_step, a.row_step, a.unit_step, panel, units};
    TileOutput out{result.data + row * result.stride + column, result.stride,
                   block.k == 0 && !p.accumulate};
    if (t == 0 && from_rows) {
      with_rows(rows, [&]<int kRows>() {
        multiply_rows<Unit, kRows>(in, MatrixView<const S>{b, p.b.stride}, block.depth, out);
      });
      continue;
    }
    // A tile writes whole vectors: a ragged one goes through a copy.
    float copy[kTileRows * kTileColumns];
    const bool ragged = width != columns;
    const auto copy_rows = [&](const float* from, int64_t from_stride, float* to, int64_t stride) {
      for (int64_t i = 0; i < rows; ++i) {
        std::memcpy(to + i * stride, from + i * from_stride,
                    static_cast<size_t>(columns) * sizeof(float));
      }
    };
    float* const c = out.c;
    if (ragged) {
      if (!out.from_zero) copy_rows(c, result.stride, copy, kTileColumns);
      out.c = copy;
      out.stride = kTileColumns;
    }
    const Ahead ahead = next.take(units, tiles < 16);
    with_vectors(vectors, [&]<int kVectors>() {
      with_rows(rows, [&]<int kRows>() { multiply_panel<Unit, kRows, kVectors>(in, ahead, out); });
    });
    if (ragged) copy_rows(copy, kTileColumns, c, result.stride);
  }
}

template <typename Unit, typename S>
inline void multiply_by_tiles(const Product<S>& given) {
  Product<S> p = given;
  if constexpr (std::is_same_v<S, float>) {
    if (p.rounded.data != nullptr) {  // there is nothing to round
      p.c = p.rounded;
      p.rounded = {};
    }
  }
  // Deep panels spare reads and writes of c, as long as a panel stays in the first cache. But few
  // rows of c wait for memory only, and memory is fastest when op(b) is read in long pieces: of a
  // few of its rows all panels, one after the other.
  const bool few_rows = p.m <= 32 && p.b.transpose == Transpose::kNo;
  const Block sizes{0, 256, 0, 512, 0, few_rows ? 32 : 128};
  Unit* panel = scratch<Unit>(Scratch::kPanels, sizes.depth * kTileColumns);
  for_each_block(p, sizes, [&](const Block& block) {
    const Factors<Unit> a = factors_of<Unit>(p.a, block);
    const MatrixView<float> result = result_of(p, block);
    for (int64_t j = 0; j < block.columns; j += kTileColumns) {
      const auto next_panel = [&] {
        const int64_t next = j + kTileColumns, end = block.k + block.depth;
        const auto width = [&](int64_t from) {
          return std::min<int64_t>(kTileColumns, block.columns - from);
        };
        if (next < block.columns) {
          return NextPanel(p.b, block.k, block.depth, block.column + next, width(next));
        }
        if (end < p.k) {
          return NextPanel(p.b, end, std::min(block.depth, p.k - end), block.column, width(0));
        }
        return NextPanel(panel);
      };
      multiply_by_panel(p, block, a, j, std::min<int64_t>(kTileColumns, block.columns - j),
                        next_panel(), panel, result);
    }
    round_rows(p, block, 0, block.rows);
  });
}

}  // namespace flashmoe::cpu::simd::FLASHMOE_SIMD_LEVEL
