// How planes are cut into tiles, and a tile's pixels and taps into vectors: the geometry of
// dynamic_depthwise_conv2d.cpp, which explains the two directions "along" and "across".
#pragma once

#include "../dynamic_depthwise_conv2d.h"
#include "integers.h"
#include "vector.h"

namespace vfmk::dynamic_depthwise_conv2d::cpu::VFMK_ISA {
namespace {

constexpr int BLOCK = LANES == 16 ? 16 : 8;          // sums that fit in 32 or in 16 registers
constexpr int64_t TILE_COLUMNS = 256;                // at most, NCHW
constexpr int64_t TILE_PIXELS = 8192;                // 32 KiB, NCHW
constexpr int64_t TILE_COLUMNS_CHANNELS_LAST = 64;   // at most
constexpr int64_t TILE_PIXELS_CHANNELS_LAST = 2048;  // 128 KiB of 16 lanes
constexpr int64_t PREFETCH = 1024;                   // elements ahead, NCHW: the plane spans pages
constexpr int64_t GRAIN = 1 << 16;                   // multiply-adds of vectors, about 10 us

// One number for each direction: a count, or the length of a step.
struct Pair {
  int64_t along, across;
};

Pair directions(const Problem& problem, int64_t rows, int64_t columns) {
  return problem.channels_last ? Pair{columns, rows} : Pair{rows, columns};
}

// The vectors of a tile in memory: the first, and the steps to its neighbours.
template <typename Element>
struct Vectors {
  Element* first;
  Pair step;

  Element* at(int64_t along, int64_t across) const {
    return first + along * step.along + across * step.across;
  }
};

int64_t number_of_taps(const Problem& problem) {
  return static_cast<int64_t>(problem.kernel_height) * problem.kernel_width;
}

// How far the last tap lies from the first.
int64_t reach_down(const Problem& problem) {
  return static_cast<int64_t>(problem.kernel_height - 1) * problem.dilation_height;
}
int64_t reach_right(const Problem& problem) {
  return static_cast<int64_t>(problem.kernel_width - 1) * problem.dilation_width;
}

// Columns left of a tile in an area that holds at least `reach` of them: whole vectors in NCHW, so
// that the tile's own columns are stored and loaded aligned.
int64_t left_margin(const Problem& problem, int64_t reach) {
  return problem.channels_last ? reach : round_up(reach, LANES);
}

// The grid of work items over planes of plane_height x plane_width.
struct Tiles {
  int64_t height, width;  // of one tile
  int64_t down, right;    // tiles in a plane
  int64_t blocks, block_channels;

  Tiles(const Problem& problem, int64_t plane_height, int64_t plane_width) {
    const bool last = problem.channels_last;
    const int64_t columns = last ? TILE_COLUMNS_CHANNELS_LAST : TILE_COLUMNS;
    const int64_t pixels = last ? TILE_PIXELS_CHANNELS_LAST : TILE_PIXELS;
    block_channels = last ? LANES : 1;
    blocks = ceil_div(problem.channels, block_channels);
    width = share(plane_width, columns, last ? BLOCK : LANES);
    height = share(plane_height, maximum(pixels / width, BLOCK), last ? 1 : BLOCK);
    down = ceil_div(plane_height, height);
    right = ceil_div(plane_width, width);
  }
  // The size of even shares of `total`: no larger than `most`, a multiple of `unit`.
  static int64_t share(int64_t total, int64_t most, int64_t unit) {
    const int64_t shares = maximum(ceil_div(total, most), 1);
    return maximum(round_up(ceil_div(total, shares), unit), unit);
  }
  int64_t per_plane() const { return down * right; }
  // Items that make a thread worth waking.
  int64_t grain(int64_t multiply_adds) const {
    return maximum(GRAIN / (height * width * block_channels / LANES * multiply_adds), 1);
  }
};

// One work item: the tile whose first pixel is (top, left), of `channels` channels from `channel`.
struct Item {
  int64_t batch, tile, channel, channels, top, left;

  Item(const Problem& problem, const Tiles& tiles, int64_t index) {
    channel = index % tiles.blocks * tiles.block_channels;
    channels = minimum(tiles.block_channels, problem.channels - channel);
    tile = index / tiles.blocks % tiles.per_plane();
    batch = index / tiles.blocks / tiles.per_plane();
    top = tile / tiles.right * tiles.height;
    left = tile % tiles.right * tiles.width;
  }
  template <typename Element>
  Element* plane(Element* image, const Strides& strides) const {
    return image + batch * strides.batch + channel * strides.channel;
  }
  // The tile itself in a dense image.
  template <typename Element>
  Vectors<Element> vectors(const Problem& problem, Element* image, const Strides& strides) const {
    return {plane(image, strides) + top * strides.row + left * strides.column,
            directions(problem, strides.row, problem.channels_last ? strides.column : LANES)};
  }
};

// The vectors of an item's tile that lie in a plane, and the lanes of those at step c that do.
struct Walk {
  Pair count;
  int64_t lanes, lanes_step;

  Walk(const Problem& problem, const Tiles& tiles, const Item& item, int64_t plane_height,
       int64_t plane_width) {
    const int64_t rows = clamp(plane_height - item.top, 0, tiles.height);
    const int64_t columns = clamp(plane_width - item.left, 0, tiles.width);
    count = directions(problem, rows, problem.channels_last ? columns : ceil_div(columns, LANES));
    lanes = problem.channels_last ? item.channels : columns;
    lanes_step = problem.channels_last ? 0 : LANES;
  }
  int64_t valid(int64_t c) const { return minimum(lanes - c * lanes_step, LANES); }
  Lane mask(int64_t c) const { return lane_index() < static_cast<int32_t>(valid(c)); }
};

// Part of a plane as fp32, with zeros outside the plane; (top, left) is the pixel at data. In NCHW
// `left` is a multiple of LANES.
struct Area {
  int64_t rows, columns;
  int64_t row, pixel;  // strides
  Pair step;           // from vector to vector
  float* data = nullptr;
  int64_t top = 0, left = 0;

  Area(const Problem& problem, int64_t rows, int64_t columns) : rows(rows), columns(columns) {
    pixel = problem.channels_last ? LANES : 1;
    row = round_up(columns * pixel, LANES);
    step = directions(problem, row, LANES);
  }
  int64_t floats() const { return rows * row; }

  Vectors<const float> at(int64_t y, int64_t x) const {
    return {data + (y - top) * row + (x - left) * pixel, step};
  }

  template <typename Format>
  void pack(const typename Format::Element* plane, const Strides strides, int64_t height,
            int64_t width, int64_t channels) const {
    const Area area = *this;  // a store might change a member, for all that the compiler knows
    const int64_t begin = clamp(-area.left, 0, area.columns);
    const int64_t end = clamp(width - area.left, begin, area.columns);
    plane += (area.left + begin) * strides.column;
    for (int64_t r = 0; r < area.rows; ++r) {
      const int64_t y = area.top + r;
      const bool inside = y >= 0 && y < height && begin < end;
      const auto* from = plane + y * strides.row;
      float* to = area.data + r * area.row;
      const int64_t zeros = inside ? begin * area.pixel : area.row;
      for (int64_t i = 0; i < zeros; i += LANES) store<Float32>(to + i, Vec{});
      if (!inside) continue;
      int64_t x = begin;
      if (area.pixel == LANES) {
        for (; x < end; ++x, from += strides.column) {
          store<Float32>(to + x * LANES, load<Format>(from, channels));
        }
      } else {
        for (; x + LANES <= end; x += LANES, from += LANES) {
          __builtin_prefetch(from + PREFETCH);
          store<Float32>(to + x, load<Format>(from));
        }
        if (x < end) store<Float32>(to + x, load<Format>(from, end - x));
      }
      for (int64_t i = round_up(end * area.pixel, LANES); i < area.row; i += LANES) {
        store<Float32>(to + i, Vec{});
      }
    }
  }
};

// A kernel as runs of taps in the direction "along".
struct Taps {
  int64_t run;  // taps in a run
  Pair count;   // of runs
  Pair step;    // from run to run in an area

  Taps(const Problem& problem, const Area& area) {
    const Pair size = directions(problem, problem.kernel_height, problem.kernel_width);
    const Pair dilation = directions(problem, problem.dilation_height, problem.dilation_width);
    const Pair tap = directions(problem, area.row, area.pixel);
    run = 1;
    for (int64_t length = 7; length > 1 && run == 1; length -= 2) {
      if (dilation.along == 1 && size.along % length == 0) run = length;
    }
    count = {size.along / run, size.across};
    step = {run * dilation.along * tap.along, dilation.across * tap.across};
  }
};

// Where tap n, in the order in which runs are walked, lies in a kernel in memory.
int64_t tap_in_memory(const Problem& problem, int64_t n) {
  if (problem.channels_last) return n;
  return n % problem.kernel_height * problem.kernel_width + n / problem.kernel_height;
}

}  // namespace
}  // namespace vfmk::dynamic_depthwise_conv2d::cpu::VFMK_ISA
