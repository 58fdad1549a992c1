// What attention kernels share: packing, and the softmax of those with queries in lanes.
//
// Those store the scores of a block of queries and a tile of keys [keys][row], the queries dense. A
// softmax over the keys then goes lane by lane, with no reduction inside a vector. Scores are in
// units of log2(e). Internal linkage throughout, as in vector.h.
#pragma once

#include <cstring>

#include "integers.h"
#include "matrix.h"
#include "vector.h"

namespace vfmk {
namespace {

constexpr float LOG2E = 1.44269504f;
constexpr float LN2 = 0.693147181f;
constexpr int64_t GRAIN = 1 << 16;  // multiply-adds of vectors, about 10 us

// Items of so many multiply-adds each that parallel_for gives to one thread at least.
inline int64_t grain_of(int64_t multiply_adds) {
  return maximum(GRAIN * LANES / (multiply_adds + 1), 1);
}

// Hands out parts of a piece of memory; of none, only adds them up.
struct Memory {
  float* data;
  int64_t floats = 0;

  float* take(int64_t wanted) {
    float* part = data == nullptr ? nullptr : data + floats;
    floats += round_up(wanted, 16);
    return part;
  }
};

// to[n][c] = factor * row_of(n)[c] for c < width, zeros where that row is null, and in the rest of
// to[rows][to_row].
template <typename Format, typename RowOf>
void pack_rows(const RowOf& row_of, int64_t rows, int64_t width, float factor, float* to,
               int64_t to_row) {
  for (int64_t n = 0; n < rows; ++n, to += to_row) {
    const typename Format::Element* row = row_of(n);
    for (int64_t c = 0; c < to_row; c += LANES) {
      store<Float32>(to + c, row && c < width ? load<Format>(row + c, width - c) * factor : Vec{});
    }
  }
}

// The same for rows that lie from_row apart, `count` of them.
template <typename Format>
void pack_rows(const typename Format::Element* from, int64_t from_row, int64_t count, int64_t width,
               float factor, float* to, int64_t rows, int64_t to_row) {
  const auto row_of = [=](int64_t n) { return n < count ? from + n * from_row : nullptr; };
  pack_rows<Format>(row_of, rows, width, factor, to, to_row);
}

// to[c][n] = factor * from[n][c] for n < rows and c < columns, of which LANES is a divisor.
inline void transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns,
                      float factor, float* to, int64_t to_row) {
  for (int64_t n = 0; n < rows; n += LANES) {
    for (int64_t c = 0; c < columns; c += LANES) {
      Vec square[LANES];
      for (int i = 0; i < LANES; ++i) {
        square[i] = load<Float32>(from + (n + i) * from_row + c) * factor;
      }
      transpose(square);
      for (int i = 0; i < LANES; ++i) store<Float32>(to + (c + i) * to_row + n, square[i]);
    }
  }
}

template <typename Format>
void write_row(const float* row, int64_t width, float factor, typename Format::Element* to) {
  for (int64_t c = 0; c < width; c += LANES) {
    store<Format>(to + c, load<Float32>(row + c) * factor, width - c);
  }
}

// The product of keys and queries as `multiply` makes it has an even number of rows.
inline void mask_spare_key(float* scores, int64_t row, int64_t keys, int64_t queries) {
  if (keys % 2 == 0) return;
  for (int64_t q = 0; q < queries; q += LANES) {
    store<Float32>(scores + keys * row + q, broadcast(-__builtin_inff()));
  }
}

// Scores become weights exp2(score - top) under new tops, and their sums over the keys are added to
// `total`. What query q has summed up under its old top is to be multiplied by factor[q]; returns
// whether any factor is not 1. An even number of keys.
inline bool soften(float* scores, int64_t row, int64_t keys, int64_t queries, float* top,
                   float* total, float* factor) {
  Lane rose = {};
  for (int64_t q = 0; q < queries; q += LANES) {
    const Vec old_top = load<Float32>(top + q);
    Vec even = old_top, odd = old_top;  // two chains of comparisons
    for (int64_t n = 0; n < keys; n += 2) {
      even = maximum(even, load<Float32>(scores + n * row + q));
      odd = maximum(odd, load<Float32>(scores + (n + 1) * row + q));
    }
    const Vec new_top = maximum(even, odd);
    const Vec fading = exp2(old_top - new_top);
    Vec sum = load<Float32>(total + q) * fading;
    for (int64_t n = 0; n < keys; ++n) {
      const Vec weight = exp2(load<Float32>(scores + n * row + q) - new_top);
      store<Float32>(scores + n * row + q, weight);
      sum += weight;
    }
    store<Float32>(top + q, new_top);
    store<Float32>(total + q, sum);
    store<Float32>(factor + q, fading);
    rose |= fading != 1.0f;
  }
  int32_t any = 0;
  for (int lane = 0; lane < LANES; ++lane) any |= rose[lane];
  return any != 0;
}

// Scores become weights exp2(score - log_sum_exp), and gradients of weights those of scores.
inline void differentiate_softmax(float* scores, float* gradients, int64_t row, int64_t keys,
                                  int64_t queries, const float* log_sum_exp, const float* delta) {
  for (int64_t q = 0; q < queries; q += LANES) {
    const Vec sums = load<Float32>(log_sum_exp + q), deltas = load<Float32>(delta + q);
    for (int64_t n = 0; n < keys; ++n) {
      const Vec weight = exp2(load<Float32>(scores + n * row + q) - sums);
      const Vec gradient = weight * (load<Float32>(gradients + n * row + q) - deltas);
      store<Float32>(scores + n * row + q, weight);
      store<Float32>(gradients + n * row + q, gradient);
    }
  }
}

}  // namespace
}  // namespace vfmk
