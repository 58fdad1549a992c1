// Products of small matrices of fp32 that lie in cache, one register tile at a time.
//
// A tile is at most 6 rows by TILE_VECTORS vectors of sums in registers, over the whole depth of
// the product: each step loads the vectors of the right factor and broadcasts 6 numbers of the left
// one. With AVX-512 that is 24 multiply-adds for 10 loads, with AVX2 12 for 8, which keeps both
// multiply-add units busy. Internal linkage throughout, as in vector.h.
#pragma once

#include <cstdint>

#include "vector.h"

namespace vfmk {
namespace {

constexpr int TILE_ROWS = 6;
constexpr int TILE_VECTORS = LANES == 16 ? 4 : 2;  // of 32 and of 16 registers

// Element (m, k) lies at data[m * row + k * step].
struct LeftFactor {
  const float* data;
  int64_t row, step;
};

// Element (k, n) lies at data[k * row + n].
struct RightFactor {
  const float* data;
  int64_t row;
};

// What the product is added to: nothing, what `to` holds, or that with row m times factors[m].
enum class Start { zero, sum, scaled_sum };

template <Start START, int ROWS, int VECTORS>
void multiply_tile(int64_t depth, LeftFactor left, RightFactor right, float* to, int64_t to_row,
                   const float* factors) {
  Vec sums[ROWS][VECTORS] = {};
  do {  // a loop that may run zero times spills its sums before it
    Vec vectors[VECTORS];
#pragma GCC unroll 8
    for (int n = 0; n < VECTORS; ++n) vectors[n] = load<Float32>(right.data + n * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const Vec number = broadcast(left.data[m * left.row]);
#pragma GCC unroll 8
      for (int n = 0; n < VECTORS; ++n) sums[m][n] += number * vectors[n];
    }
    left.data += left.step;
    right.data += right.row;
  } while (--depth > 0);
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < VECTORS; ++n) {
      float* place = to + m * to_row + n * LANES;
      if constexpr (START == Start::sum) sums[m][n] += load<Float32>(place);
      if constexpr (START == Start::scaled_sum) sums[m][n] += load<Float32>(place) * factors[m];
      store<Float32>(place, sums[m][n]);
    }
  }
}

template <Start START, int ROWS>
void multiply_tile(int64_t vectors, int64_t depth, LeftFactor left, RightFactor right, float* to,
                   int64_t to_row, const float* factors) {
  switch (vectors) {
    case 1:
      return multiply_tile<START, ROWS, 1>(depth, left, right, to, to_row, factors);
    case 2:
      return multiply_tile<START, ROWS, 2>(depth, left, right, to, to_row, factors);
#if defined(__AVX512F__)
    case 3:
      return multiply_tile<START, ROWS, 3>(depth, left, right, to, to_row, factors);
    case 4:
      return multiply_tile<START, ROWS, 4>(depth, left, right, to, to_row, factors);
#endif
  }
}

// to[m * to_row + n] = START + sum over k of left(m, k) * right(k, n), for m < rows, an even
// number, and n < vectors * LANES.
template <Start START>
void multiply(int64_t rows, int64_t vectors, int64_t depth, LeftFactor left, RightFactor right,
              float* to, int64_t to_row, const float* factors = nullptr) {
  const int64_t groups = (vectors + TILE_VECTORS - 1) / TILE_VECTORS;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = group * vectors / groups;
    const int64_t count = (group + 1) * vectors / groups - begin;
    const RightFactor panel = {right.data + begin * LANES, right.row};
    for (int64_t m = 0; m < rows; m += TILE_ROWS) {
      const LeftFactor some = {left.data + m * left.row, left.row, left.step};
      float* sums = to + m * to_row + begin * LANES;
      const float* row_factors = START == Start::scaled_sum ? factors + m : nullptr;
      switch (rows - m) {
        case 2:
          multiply_tile<START, 2>(count, depth, some, panel, sums, to_row, row_factors);
          break;
        case 4:
          multiply_tile<START, 4>(count, depth, some, panel, sums, to_row, row_factors);
          break;
        default:
          multiply_tile<START, 6>(count, depth, some, panel, sums, to_row, row_factors);
      }
    }
  }
}

}  // namespace
}  // namespace vfmk
