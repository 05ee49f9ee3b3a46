// Loops over rows: activations and their gradients, rounding, sums.
#pragma once

#include "kernels/cpu/simd/panel.h"

namespace flashmoe::cpu::simd::FLASHMOE_SIMD_LEVEL {

// Columns that are treated at once. A chunk lies in the first cache, and the loops over it are
// plain ones over floats, which the compiler turns into vectors. A ragged end is filled up to whole
// vectors, so that an element is computed in the same way wherever it stands.
inline constexpr int kChunk = 512;

struct Chunk {
  alignas(64) float at[kChunk];
};

// Calls f(column, columns of the chunk) for all chunks of a row.
template <typename F>
inline void for_each_chunk(int64_t columns, F f) {
  for (int64_t c = 0; c < columns; c += kChunk) f(c, std::min<int64_t>(kChunk, columns - c));
}

template <typename S>
inline void load_chunk(const S* from, int64_t count, Chunk& to) {
  for (int64_t c = 0; c < count; c += kLanes) store(load(from + c, count - c), to.at + c);
}
template <typename S>
inline void store_chunk(const Chunk& from, int64_t count, S* to) {
  for (int64_t c = 0; c < count; c += kLanes) store(load(from.at + c), to + c, count - c);
}
template <typename S>
inline void add_chunk(const S* from, int64_t count, Chunk& to) {
  for (int64_t c = 0; c < count; c += kLanes) {
    store(load(to.at + c) + load(from + c, count - c), to.at + c);
  }
}

inline float sum_of_lanes(Vector v) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

template <typename T>
inline T* element(MatrixView<T> m, int64_t row, int64_t column) {
  return m.data + row * m.stride + column;
}

template <typename S>
inline void load_pre_activations(const PreActivations<S>& from, int64_t row, int64_t column,
                                 int64_t count, Chunk& to) {
  load_chunk(element(from.product, row, column), count, to);
  if (from.bias != nullptr) add_chunk(from.bias + column, count, to);
}

// Flattened, so that the whole of an activation is inlined into the loop over a chunk.
template <Activation kKind, typename S>
[[gnu::flatten]] void activate(const ActivationTile<S>& tile) {
  const bool gated = tile.gate.product.data != nullptr;
  for (int64_t r = 0; r < tile.rows; ++r) {
    for_each_chunk(tile.columns, [&](int64_t column, int64_t count) {
      const auto load_and_keep = [&](const PreActivations<S>& from, MatrixView<S> kept, Chunk& to) {
        load_pre_activations(from, r, column, count, to);
        if (kept.data != nullptr) store_chunk(to, count, element(kept, r, column));
      };
      Chunk up, activated;
      load_and_keep(tile.up, tile.kept_up, up);
      const int64_t filled = round_up(count, kLanes);
      if (gated) {
        Chunk gate;
        load_and_keep(tile.gate, tile.kept_gate, gate);
        for (int64_t c = 0; c < filled; ++c) {
          activated.at[c] = cpu::activate<kKind>(gate.at[c]).value * up.at[c];
        }
      } else {
        for (int64_t c = 0; c < filled; ++c) {
          activated.at[c] = cpu::activate<kKind>(up.at[c]).value;
        }
      }
      store_chunk(activated, count, element(tile.activated, r, column));
    });
  }
}

template <Activation kKind, typename S>
[[gnu::flatten]] void activation_gradient(const GradientTile<S>& tile) {
  const bool gated = tile.gate.product.data != nullptr || tile.kept_gate.data != nullptr;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float w = tile.weights[r];
    Vector sum{};
    for_each_chunk(tile.columns, [&](int64_t column, int64_t count) {
      const auto load_either = [&](const PreActivations<S>& from, MatrixView<const S> kept,
                                   Chunk& to) {
        if (kept.data != nullptr) {
          load_chunk(element(kept, r, column), count, to);
        } else {
          load_pre_activations(from, r, column, count, to);
        }
      };
      Chunk da, up, d_up, weighted, shares;
      load_chunk(element(tile.da, r, column), count, da);
      load_either(tile.up, tile.kept_up, up);
      const int64_t filled = round_up(count, kLanes);
      if (gated) {
        Chunk gate, d_gate;
        load_either(tile.gate, tile.kept_gate, gate);
        for (int64_t c = 0; c < filled; ++c) {
          const auto [value, slope] = cpu::activate<kKind>(gate.at[c]);
          const float activated = value * up.at[c];
          weighted.at[c] = w * activated;
          shares.at[c] = da.at[c] * activated;
          d_up.at[c] = w * da.at[c] * value;
          d_gate.at[c] = w * da.at[c] * up.at[c] * slope;
        }
        store_chunk(d_gate, count, element(tile.d_gate, r, column));
      } else {
        for (int64_t c = 0; c < filled; ++c) {
          const auto [value, slope] = cpu::activate<kKind>(up.at[c]);
          weighted.at[c] = w * value;
          shares.at[c] = da.at[c] * value;
          d_up.at[c] = w * da.at[c] * slope;
        }
      }
      store_chunk(d_up, count, element(tile.d_up, r, column));
      store_chunk(weighted, count, element(tile.weighted, r, column));
      for (int64_t c = 0; c < filled; c += kLanes) sum += load(shares.at + c);
    });
    *element(tile.shares, r, 0) = sum_of_lanes(sum);
  }
}

template <typename S>
void round_row(const float* from, const S* bias, S* to, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const Vector v = load(from + c, columns - c);
    store(bias == nullptr ? v : v + load(bias + c, columns - c), to + c, columns - c);
  }
}

// to = the weighted sum of row_at(0), ... row_at(count - 1).
template <typename S, typename RowAt>
inline void weighted_sum(RowAt row_at, const float* weights, int64_t count, S* to,
                         int64_t columns) {
  for_each_chunk(columns, [&](int64_t column, int64_t width) {
    Chunk sum{};
    for (int64_t r = 0; r < count; ++r) {
      const S* row = row_at(r) + column;
      if (weights == nullptr) {
        add_chunk(row, width, sum);
        continue;
      }
      for (int64_t c = 0; c < width; c += kLanes) {
        store(load(sum.at + c) + weights[r] * load(row + c, width - c), sum.at + c);
      }
    }
    store_chunk(sum, width, to + column);
  });
}

template <typename S>
void sum_rows(const S* const* rows, const float* weights, int64_t count, S* to, int64_t columns) {
  weighted_sum([&](int64_t r) { return rows[r]; }, weights, count, to, columns);
}

template <typename S>
void sum_matrix_rows(MatrixView<const S> rows, const float* weights, int64_t count, S* to,
                     int64_t columns) {
  weighted_sum([&](int64_t r) { return rows.data + r * rows.stride; }, weights, count, to, columns);
}

template <typename S>
float dot(const S* a, const S* b, int64_t count) {
  Vector sum{};
  for (int64_t c = 0; c < count; c += kLanes)
    sum += load(a + c, count - c) * load(b + c, count - c);
  return sum_of_lanes(sum);
}

}  // namespace flashmoe::cpu::simd::FLASHMOE_SIMD_LEVEL
