// A register tile of the convolution: up to 6 pixels of a row by TILE_VECTORS vectors of output
// channels, over all taps and input channels. Panels hold 4-byte units, each one step of the
// product: one input channel in fp32, or two in bf16 where the machine multiplies pairs.
#pragma once

#include <cstdint>
#include <cstring>

#include "matrix.h"
#include "vector.h"

namespace vfmk {
namespace {

struct Singles {
  using Format = Float32;
  static constexpr int64_t CHANNELS = 1;  // of a unit
  static void put(float* to, float value) { *to = value; }
  static Vec multiply_add(Vec sum, Vec a, Vec b) { return sum + a * b; }
};

#if defined(__AVX512F__)
// Products of bf16 are exact in fp32; subnormal numbers count as zero.
struct Pairs {
  using Format = BFloat16;
  static constexpr int64_t CHANNELS = 2;
  static bool supported() { return __builtin_cpu_supports("avx512bf16"); }
  static void put(uint16_t* to, float bfloat16) {
    uint32_t bits;
    std::memcpy(&bits, &bfloat16, sizeof bits);
    *to = bits >> 16;
  }
  // In assembly, since this unit is compiled for machines without it, too.
  static Vec multiply_add(Vec sum, Vec a, Vec b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
};
#endif

// The taps of one pixel, in units: `rows` times `runs` runs of `depth` units, one after the other.
struct Reach {
  int64_t rows, runs, depth;
  int64_t row_step, run_step;
};

inline Vec broadcast_unit(const float* unit) {
  uint32_t bits;
  std::memcpy(&bits, unit, sizeof bits);
  return (Vec)(Bits{} + bits);
}

// sums[m][o] = bias[o] + the product of pixel m's reach with weight[unit][o].
template <typename Panel, int ROWS, int VECTORS>
void convolve_tile(const Reach& reach, const float* pixels, int64_t pixel, const float* weight,
                   const float* bias, float* sums_to, int64_t row) {
  Vec sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < VECTORS; ++n) sums[m][n] = load<Float32>(bias + n * LANES);
  }
  for (int64_t i = 0; i < reach.rows; ++i) {
    for (int64_t j = 0; j < reach.runs; ++j) {
      const float* units = pixels + i * reach.row_step + j * reach.run_step;
      int64_t depth = reach.depth;
      do {
        Vec vectors[VECTORS];
#pragma GCC unroll 8
        for (int n = 0; n < VECTORS; ++n) vectors[n] = load<Float32>(weight + n * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m) {
          const Vec unit = broadcast_unit(units + m * pixel);
#pragma GCC unroll 8
          for (int n = 0; n < VECTORS; ++n) {
            sums[m][n] = Panel::multiply_add(sums[m][n], unit, vectors[n]);
          }
        }
        ++units;
        weight += row;
      } while (--depth > 0);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < VECTORS; ++n) store<Float32>(sums_to + m * row + n * LANES, sums[m][n]);
  }
}

template <typename Panel, int ROWS>
void convolve_tile(int64_t vectors, const Reach& reach, const float* pixels, int64_t pixel,
                   const float* weight, const float* bias, float* sums, int64_t row) {
  switch (vectors) {
    case 1:
      return convolve_tile<Panel, ROWS, 1>(reach, pixels, pixel, weight, bias, sums, row);
    case 2:
      return convolve_tile<Panel, ROWS, 2>(reach, pixels, pixel, weight, bias, sums, row);
#if defined(__AVX512F__)
    case 3:
      return convolve_tile<Panel, ROWS, 3>(reach, pixels, pixel, weight, bias, sums, row);
    case 4:
      return convolve_tile<Panel, ROWS, 4>(reach, pixels, pixel, weight, bias, sums, row);
#endif
  }
}

// sums[m * row + o] for m < columns, an even number of pixels that lie `pixel` units apart, and
// o < row, a number that LANES divides.
template <typename Panel>
void convolve_row(int64_t columns, const Reach& reach, const float* pixels, int64_t pixel,
                  const float* weight, const float* bias, float* sums, int64_t row) {
  const int64_t vectors = row / LANES;
  const int64_t groups = (vectors + TILE_VECTORS - 1) / TILE_VECTORS;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = group * vectors / groups;
    const int64_t count = (group + 1) * vectors / groups - begin;
    const int64_t first = begin * LANES;
    for (int64_t m = 0; m < columns; m += TILE_ROWS) {
      const auto tile = columns - m == 2   ? convolve_tile<Panel, 2>
                        : columns - m == 4 ? convolve_tile<Panel, 4>
                                           : convolve_tile<Panel, TILE_ROWS>;
      tile(count, reach, pixels + m * pixel, pixel, weight + first, bias + first,
           sums + m * row + first, row);
    }
  }
}

}  // namespace
}  // namespace vfmk
