// What attention kernels with queries in lanes share: the softmax, packing, and the integers.
//
// Scores of a block of queries and a tile of keys are stored [keys][row], the queries dense. A
// softmax over the keys then goes lane by lane, with no reduction inside a vector. Scores are in
// units of log2(e). Internal linkage throughout, as in vector.h.
#pragma once

#include <cstring>

#include "matrix.h"
#include "vector.h"

namespace vfmk {
namespace {

constexpr float LOG2E = 1.44269504f;
constexpr float LN2 = 0.693147181f;
constexpr int64_t GRAIN = 1 << 16;  // multiply-adds of vectors, about 10 us

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t clamp(int64_t a, int64_t low, int64_t high) {
  return maximum(minimum(a, high), low);
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

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

// to[n][c] = factor * from[n][c] for n < count and c < width; zeros in the rest of
// to[rows][to_row].
template <typename Format>
void pack_rows(const typename Format::Element* from, int64_t from_row, int64_t count, int64_t width,
               float factor, float* to, int64_t rows, int64_t to_row) {
  for (int64_t n = 0; n < count; ++n, from += from_row, to += to_row) {
    for (int64_t c = 0; c < to_row; c += LANES) {
      store<Float32>(to + c, c < width ? load<Format>(from + c, width - c) * factor : Vec{});
    }
  }
  std::memset(to, 0, (rows - count) * to_row * sizeof(float));
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
