// Depthwise convolution with its own kernel for every sample and channel, on the CPU.
//
// One work item is one tile of one plane (NCHW) or of LANES channels (channels-last). It packs what
// the tile reads, halo included, into a zero-padded fp32 area that stays in cache: padding, strides
// and storage format end there, and one code serves both layouts:
//
//                   a vector holds    "along" runs      "across" runs
//   NCHW            LANES columns     down the rows     from vector to vector of a row
//   channels-last   LANES channels    along the row     down the rows
//
// Along the first direction one loaded vector serves all K taps of a run and BLOCK outputs, so that
// BLOCK + K - 1 loads feed BLOCK * K multiply-adds. In registers: K weights and BLOCK sums (forward
// and grad_input), or BLOCK gradients and several sets of K sums (grad_weight). Runs of 7, 5 and 3
// taps are compiled; other kernels are made of these (9 = 3 * 3) or of single taps.
//
// Memory, for N elements of s bytes: forward reads the input and writes the output once, 2Ns +
// BCk^2 s bytes; backward reads input and gradient and writes grad_input once, 3Ns + 2BCk^2 s. Only
// halos are read again, from cache. Work: 2k^2 N FLOP forward, 4k^2 N backward.
//
// Tiles follow from the problem alone and their sums are added in a fixed order: the result does
// not depend on the number of threads.
#include "../dynamic_depthwise_conv2d.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "../parallel.h"
#include "vector.h"

namespace vfmk::dynamic_depthwise_conv2d::cpu::VFMK_ISA {
namespace {

constexpr int BLOCK = 8;
constexpr int64_t TILE_COLUMNS = 128;               // at most, NCHW
constexpr int64_t TILE_COLUMNS_CHANNELS_LAST = 64;  // at most
constexpr int64_t TILE_PIXELS = 4096;               // 16 KiB, NCHW
constexpr int64_t TILE_PIXELS_CHANNELS_LAST = 2048; // 128 KiB of 16 lanes
constexpr int64_t GRAIN = 1 << 16;                  // multiply-adds of vectors, about 10 us
constexpr int64_t FINISH_CHANNELS = 16;             // one work item of the last sum

int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t clamp(int64_t a, int64_t low, int64_t high) { return maximum(minimum(a, high), low); }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// One number for each direction: a count, or the length of a step.
struct Pair {
  int64_t along, across;
};

Pair directions(const Problem& problem, int64_t rows, int64_t columns) {
  return problem.channels_last ? Pair{columns, rows} : Pair{rows, columns};
}

// Steps from vector to vector of an image.
Pair vector_step(const Problem& problem, const Strides& strides) {
  return directions(problem, strides.row, problem.channels_last ? strides.column : LANES);
}

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

// The grid of work items over planes of height x width.
struct Tiles {
  int64_t height, width;  // of one tile
  int64_t down, right;    // number of tiles in a plane
  int64_t blocks, block_channels;

  Tiles(const Problem& problem, int64_t plane_height, int64_t plane_width) {
    const bool last = problem.channels_last;
    const int64_t most = last ? TILE_COLUMNS_CHANNELS_LAST : TILE_COLUMNS;
    const int64_t pixels = last ? TILE_PIXELS_CHANNELS_LAST : TILE_PIXELS;
    block_channels = last ? LANES : 1;
    blocks = ceil_div(problem.channels, block_channels);
    width = evenly(plane_width, most, last ? BLOCK : LANES);
    height = evenly(plane_height, maximum(pixels / width, BLOCK), last ? 1 : BLOCK);
    down = ceil_div(plane_height, height);
    right = ceil_div(plane_width, width);
  }
  // The size of parts, multiples of `unit` and no larger than `most`, that share out `total`.
  static int64_t evenly(int64_t total, int64_t most, int64_t unit) {
    const int64_t parts = maximum(ceil_div(total, most), 1);
    return maximum(round_up(ceil_div(total, parts), unit), unit);
  }
  int64_t per_plane() const { return down * right; }
  int64_t items(const Problem& problem) const { return problem.batch * per_plane() * blocks; }
  int64_t grain(int64_t multiply_adds) const {
    const int64_t vectors = height * width * block_channels / LANES;
    return maximum(GRAIN / (vectors * multiply_adds), 1);
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
  int64_t plane(const Strides& strides) const {
    return batch * strides.batch + channel * strides.channel;
  }
  int64_t pixel(const Strides& strides) const {
    return plane(strides) + top * strides.row + left * strides.column;
  }
};

// The vectors of an item's tile that lie in an image of height x width, and how many lanes of those
// at step c across do.
struct Walk {
  Pair count;
  int64_t lanes, lanes_step;

  Walk(const Problem& problem, const Tiles& tiles, const Item& item, int64_t height,
       int64_t width) {
    const int64_t rows = clamp(height - item.top, 0, tiles.height);
    const int64_t columns = clamp(width - item.left, 0, tiles.width);
    count = problem.channels_last ? Pair{columns, rows} : Pair{rows, ceil_div(columns, LANES)};
    lanes = problem.channels_last ? item.channels : columns;
    lanes_step = problem.channels_last ? 0 : LANES;
  }
  int64_t valid(int64_t c) const { return minimum(lanes - c * lanes_step, LANES); }
  Lane mask(int64_t c) const { return lane_index() < static_cast<int32_t>(valid(c)); }
};

// A part of an image as fp32, with zeros outside the image.
struct Area {
  int64_t rows, columns;
  int64_t row, pixel;  // strides, in floats
  Pair step;           // from vector to vector, in floats
  float* data;
  int64_t top, left;  // the image's pixel at data

  Area(const Problem& problem, int64_t rows, int64_t columns) : rows(rows), columns(columns) {
    pixel = problem.channels_last ? LANES : 1;
    row = round_up(columns * pixel, LANES);
    step = directions(problem, row, LANES);
  }
  int64_t floats() const { return rows * row; }
  const float* at(int64_t y, int64_t x) const { return data + (y - top) * row + (x - left) * pixel; }

  template <typename Format>
  void pack(const typename Format::Element* image, const Strides& strides, int64_t height,
            int64_t width, int64_t channels) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t y = top + r;
      const bool inside = y >= 0 && y < height;
      const int64_t begin = inside ? clamp(-left, 0, columns) : columns;
      const int64_t end = clamp(width - left, begin, columns);
      float* to = data + r * row;
      for (int64_t i = 0; i < begin * pixel; i += LANES) store<Float32>(to + i, Vec{});
      if (begin < end) {
        const auto* from = image + y * strides.row + (left + begin) * strides.column;
        if (pixel == LANES) {
          for (int64_t x = begin; x < end; ++x, from += strides.column) {
            store<Float32>(to + x * LANES, load<Format>(from, channels));
          }
        } else {
          int64_t x = begin;
          for (; x + LANES <= end; x += LANES, from += LANES) {
            store<Float32>(to + x, load<Format>(from));
          }
          if (x < end) store<Float32>(to + x, load<Format>(from, end - x), row - x);
        }
      }
      for (int64_t i = end * pixel; i < row; i += LANES) store<Float32>(to + i, Vec{}, row - i);
    }
  }
};

// A kernel as runs of taps in the direction "along".
struct Taps {
  int64_t run;  // taps in a run
  Pair count;   // of runs
  Pair step;    // from run to run in an area, in floats

  Taps(const Problem& problem, const Area& area) {
    const Pair size = directions(problem, problem.kernel_height, problem.kernel_width);
    const Pair dilation = directions(problem, problem.dilation_height, problem.dilation_width);
    run = 1;
    for (int64_t length = 7; length > 1 && run == 1; length -= 2) {
      if (dilation.along == 1 && size.along % length == 0) run = length;
    }
    const Pair tap = directions(problem, area.row, area.pixel);
    count = {size.along / run, size.across};
    step = {run * dilation.along * tap.along, dilation.across * tap.across};
  }
};

// Where the nth tap, in the order in which runs are walked, lies in a kernel in memory.
int64_t tap_in_memory(const Problem& problem, int64_t n) {
  if (problem.channels_last) return n;
  return n % problem.kernel_height * problem.kernel_width + n / problem.kernel_height;
}

template <typename Format>
void pack_weight(const Problem& problem, const Item& item, const typename Format::Element* weight,
                 bool flip, Vec* packed) {
  const int64_t taps = number_of_taps(problem);
  weight += ((problem.shared_weight ? 0 : item.batch) * problem.channels + item.channel) * taps;
  for (int64_t n = 0; n < taps; ++n) {
    const auto* tap = weight + tap_in_memory(problem, flip ? taps - 1 - n : n);
    typename Format::Element lanes[LANES] = {};
    for (int64_t c = 0; c < item.channels; ++c) lanes[c] = tap[c * taps];
    const Vec value = load<Format>(lanes);
    packed[n] = problem.channels_last ? value : Vec{} + value[0];
  }
}

// to[p] = start + sum over taps n of weight[n] * source[p + n], for every vector p of the walk.
template <typename Format, int K>
void correlate(const Walk& walk, const float* source, Pair source_step, const Taps& taps,
               const Vec* weight, Vec start, typename Format::Element* to, Pair to_step) {
  for (int64_t a = 0; a < walk.count.along; a += BLOCK) {
    for (int64_t c = 0; c < walk.count.across; ++c) {
      Vec sums[BLOCK];
#pragma GCC unroll 8
      for (int p = 0; p < BLOCK; ++p) sums[p] = start;
      const float* first = source + a * source_step.along + c * source_step.across;
      const Vec* w = weight;
      for (int64_t i = 0; i < taps.count.across; ++i) {
        for (int64_t j = 0; j < taps.count.along; ++j, w += K) {
          const float* from = first + i * taps.step.across + j * taps.step.along;
#pragma GCC unroll 16
          for (int t = 0; t < BLOCK + K - 1; ++t) {
            const Vec value = load<Float32>(from + t * source_step.along);
#pragma GCC unroll 8
            for (int s = 0; s < K; ++s) {
              if (t >= s && t - s < BLOCK) sums[t - s] += w[s] * value;
            }
          }
        }
      }
      auto* out = to + a * to_step.along + c * to_step.across;
#pragma GCC unroll 8
      for (int p = 0; p < BLOCK; ++p) {
        if (a + p < walk.count.along) store<Format>(out + p * to_step.along, sums[p], walk.valid(c));
      }
    }
  }
}

template <typename Format>
void correlate(const Walk& walk, const float* source, Pair source_step, const Taps& taps,
               const Vec* weight, Vec start, typename Format::Element* to, Pair to_step) {
  const auto run = taps.run == 7   ? correlate<Format, 7>
                   : taps.run == 5 ? correlate<Format, 5>
                   : taps.run == 3 ? correlate<Format, 3>
                                   : correlate<Format, 1>;
  run(walk, source, source_step, taps, weight, start, to, to_step);
}

// Sums kept for each tap of a run: enough that no multiply-add waits for the one before it.
template <int K>
constexpr int SETS = K == 1 ? 8 : K == 3 ? 4 : 2;

// sums[..][s] += gradient[p] * source[p + s] for p < N and s < K.
template <int K, int N>
inline void accumulate(Vec (&sums)[SETS<K>][K], const float* gradient, int64_t gradient_step,
                       const float* source, int64_t source_step, Lane mask) {
  Vec g[N];
#pragma GCC unroll 8
  for (int p = 0; p < N; ++p) g[p] = masked(load<Float32>(gradient + p * gradient_step), mask);
#pragma GCC unroll 16
  for (int t = 0; t < N + K - 1; ++t) {
    const Vec value = masked(load<Float32>(source + t * source_step), mask);
#pragma GCC unroll 8
    for (int s = 0; s < K; ++s) {
      if (t >= s && t - s < N) sums[(t - s) % SETS<K>][s] += g[t - s] * value;
    }
  }
}

// totals[n] += sum of gradient[p] * source[p + n] over the vectors p of the walk, for every tap n.
// Each line of vectors is first summed by itself, as short sums lose less to rounding. Lanes beyond
// the image are masked in both factors: an infinity in one would make a NaN of a zero in the other.
template <int K>
void correlate_gradient(const Walk& walk, const float* gradient, Pair gradient_step,
                        const float* source, Pair source_step, const Taps& taps, Vec* totals) {
  for (int64_t c = 0; c < walk.count.across; ++c) {
    const Lane mask = walk.mask(c);
    Vec* total = totals;
    for (int64_t i = 0; i < taps.count.across; ++i) {
      for (int64_t j = 0; j < taps.count.along; ++j, total += K) {
        const float* g = gradient + c * gradient_step.across;
        const float* x =
            source + c * source_step.across + i * taps.step.across + j * taps.step.along;
        Vec sums[SETS<K>][K] = {};
        int64_t left = walk.count.along;
        for (; left >= BLOCK; left -= BLOCK) {
          accumulate<K, BLOCK>(sums, g, gradient_step.along, x, source_step.along, mask);
          g += BLOCK * gradient_step.along;
          x += BLOCK * source_step.along;
        }
        for (; left > 0; --left) {
          accumulate<K, 1>(sums, g, gradient_step.along, x, source_step.along, mask);
          g += gradient_step.along;
          x += source_step.along;
        }
#pragma GCC unroll 8
        for (int s = 0; s < K; ++s) {
#pragma GCC unroll 8
          for (int set = 1; set < SETS<K>; ++set) sums[0][s] += sums[set][s];
          total[s] += sums[0][s];
        }
      }
    }
  }
}

void correlate_gradient(const Walk& walk, const float* gradient, Pair gradient_step,
                        const float* source, Pair source_step, const Taps& taps, Vec* totals) {
  const auto run = taps.run == 7   ? correlate_gradient<7>
                   : taps.run == 5 ? correlate_gradient<5>
                   : taps.run == 3 ? correlate_gradient<3>
                                   : correlate_gradient<1>;
  run(walk, gradient, gradient_step, source, source_step, taps, totals);
}

Vec sum_gradient(const Walk& walk, const float* gradient, Pair gradient_step) {
  Vec total = {};
  for (int64_t c = 0; c < walk.count.across; ++c) {
    const Lane mask = walk.mask(c);
    const float* g = gradient + c * gradient_step.across;
    Vec sums[4] = {};
    for (int64_t a = 0; a < walk.count.along; ++a, g += gradient_step.along) {
      sums[a % 4] += masked(load<Float32>(g), mask);
    }
    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  return total;
}

// One thread's memory. It grows to the largest call and lives as long as the thread; it starts as
// zeros, so that lanes on which no result depends are never uninitialised.
struct Scratch {
  float* data = nullptr;
  int64_t floats = 0;

  float* reserve(int64_t wanted) {
    if (wanted > floats) {
      std::free(data);
      floats = round_up(wanted, 16);
      data = static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float)));
      if (data == nullptr) {
        floats = 0;
        throw std::bad_alloc();
      }
      std::memset(data, 0, floats * sizeof(float));
    }
    return data;
  }
  ~Scratch() { std::free(data); }
};

thread_local Scratch scratch;

template <typename Format>
void forward_tiles(const Problem& problem, const void* input, const void* weight, const void* bias,
                   void* output) {
  using Element = typename Format::Element;
  const Tiles tiles(problem, problem.output_height, problem.output_width);
  const Area area(problem, tiles.height + reach_down(problem), tiles.width + reach_right(problem));
  const Taps taps(problem, area);
  const int64_t weight_floats = number_of_taps(problem) * LANES;

  const auto body = [&](int64_t begin, int64_t end) {
    float* memory = scratch.reserve(weight_floats + area.floats());
    Vec* packed_weight = reinterpret_cast<Vec*>(memory);
    Area x = area;
    x.data = memory + weight_floats;
    for (int64_t index = begin; index < end; ++index) {
      const Item item(problem, tiles, index);
      const Walk walk(problem, tiles, item, problem.output_height, problem.output_width);
      x.top = item.top - problem.pad_top;
      x.left = item.left - problem.pad_left;
      x.template pack<Format>(static_cast<const Element*>(input) + item.plane(problem.input),
                              problem.input, problem.input_height, problem.input_width,
                              item.channels);
      pack_weight<Format>(problem, item, static_cast<const Element*>(weight), false, packed_weight);
      Vec start = {};
      if (bias != nullptr) {
        const Element* first = static_cast<const Element*>(bias) + item.channel +
                               (problem.shared_bias ? 0 : item.batch * problem.channels);
        start = load<Format>(first, item.channels);
        if (!problem.channels_last) start = Vec{} + start[0];
      }
      correlate<Format>(walk, x.data, x.step, taps, packed_weight, start,
                        static_cast<Element*>(output) + item.pixel(problem.output),
                        vector_step(problem, problem.output));
    }
  };
  parallel_for(tiles.items(problem), tiles.grain(number_of_taps(problem) + BLOCK), body);
}

// Partial sums of every item, one for each tap and one for the bias, in
// workspace[batch][tile][tap][channel].
struct Partials {
  int64_t sums, channels, tiles;

  Partials(const Problem& problem, const Tiles& tiles)
      : sums(number_of_taps(problem) + 1),
        channels(round_up(problem.channels, LANES)),
        tiles(tiles.per_plane()) {}
  int64_t floats(const Problem& problem) const { return problem.batch * tiles * sums * channels; }
  int64_t at(int64_t batch, int64_t tile, int64_t channel) const {
    return (batch * tiles + tile) * sums * channels + channel;
  }
};

Tiles backward_grid(const Problem& problem) {
  return Tiles(problem, maximum(problem.input_height, problem.output_height),
               maximum(problem.input_width, problem.output_width));
}

template <typename Format>
void backward_tiles(const Problem& problem, const Backward& arguments) {
  using Element = typename Format::Element;
  const Tiles tiles = backward_grid(problem);
  const Partials partials(problem, tiles);
  const int64_t taps_count = number_of_taps(problem);
  const Area input_area(problem, tiles.height + reach_down(problem),
                        tiles.width + reach_right(problem));
  // grad_input is a correlation with the flipped kernel, padded by reach - pad.
  const int64_t above = maximum(reach_down(problem) - problem.pad_top, 0);
  const int64_t before = round_up(maximum(reach_right(problem) - problem.pad_left, 0),
                                  problem.channels_last ? 1 : LANES);
  const Area gradient_area(problem, above + tiles.height + problem.pad_top,
                           before + tiles.width + problem.pad_left);
  const Taps input_taps(problem, input_area);
  const Taps gradient_taps(problem, gradient_area);

  const auto body = [&](int64_t begin, int64_t end) {
    float* memory = scratch.reserve((2 * taps_count + 1) * LANES + input_area.floats() +
                                    gradient_area.floats());
    Vec* packed_weight = reinterpret_cast<Vec*>(memory);
    Vec* totals = packed_weight + taps_count;
    Area x = input_area;
    Area g = gradient_area;
    x.data = memory + (2 * taps_count + 1) * LANES;
    g.data = x.data + x.floats();
    for (int64_t index = begin; index < end; ++index) {
      const Item item(problem, tiles, index);
      g.top = item.top - above;
      g.left = item.left - before;
      g.template pack<Format>(
          static_cast<const Element*>(arguments.grad_output) + item.plane(problem.output),
          problem.output, problem.output_height, problem.output_width, item.channels);
      if (arguments.grad_input != nullptr) {
        const Walk walk(problem, tiles, item, problem.input_height, problem.input_width);
        pack_weight<Format>(problem, item, static_cast<const Element*>(arguments.weight), true,
                            packed_weight);
        correlate<Format>(walk,
                          g.at(item.top + problem.pad_top - reach_down(problem),
                               item.left + problem.pad_left - reach_right(problem)),
                          g.step, gradient_taps, packed_weight, Vec{},
                          static_cast<Element*>(arguments.grad_input) +
                              item.pixel(problem.grad_input),
                          vector_step(problem, problem.grad_input));
      }
      const Walk walk(problem, tiles, item, problem.output_height, problem.output_width);
      for (int64_t n = 0; n <= taps_count; ++n) totals[n] = Vec{};
      if (arguments.grad_weight != nullptr) {
        x.top = item.top - problem.pad_top;
        x.left = item.left - problem.pad_left;
        x.template pack<Format>(
            static_cast<const Element*>(arguments.input) + item.plane(problem.input), problem.input,
            problem.input_height, problem.input_width, item.channels);
        correlate_gradient(walk, g.at(item.top, item.left), g.step, x.data, x.step, input_taps,
                           totals);
      }
      if (arguments.grad_bias != nullptr) {
        totals[taps_count] = sum_gradient(walk, g.at(item.top, item.left), g.step);
      }
      float* sums = arguments.workspace + partials.at(item.batch, item.tile, item.channel);
      for (int64_t n = 0; n <= taps_count; ++n, sums += partials.channels) {
        if (problem.channels_last) {
          store<Float32>(sums, totals[n]);
        } else {
          *sums = sum_of_lanes(totals[n]);
        }
      }
    }
  };
  parallel_for(tiles.items(problem), tiles.grain(2 * number_of_taps(problem) + BLOCK), body);
}

// Adds up `count` of the partial sums from number `first` on, over tiles, and over the batch where
// it shares one kernel, into a gradient of shape [batch or 1, channels, count].
template <typename Format>
void finish(const Problem& problem, const Partials& partials, const float* workspace, int64_t first,
            int64_t count, bool shared, typename Format::Element* gradient) {
  const int64_t blocks = partials.channels / LANES;
  const int64_t terms = (shared ? problem.batch : 1) * partials.tiles;
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t batch = index / blocks;
      const int64_t channel = index % blocks * LANES;
      const int64_t last_batch = shared ? problem.batch : batch + 1;
      const int64_t channels = minimum(problem.channels - channel, LANES);
      auto* to = gradient + (batch * problem.channels + channel) * count;
      for (int64_t n = 0; n < count; ++n) {
        Vec total = {};
        for (int64_t b = batch; b < last_batch; ++b) {
          Vec sum = {};
          for (int64_t tile = 0; tile < partials.tiles; ++tile) {
            sum += load<Float32>(workspace + partials.at(b, tile, channel) +
                                 (first + n) * partials.channels);
          }
          total += sum;
        }
        typename Format::Element values[LANES];
        store<Format>(values, total);
        const int64_t tap = tap_in_memory(problem, n);
        for (int64_t c = 0; c < channels; ++c) to[c * count + tap] = values[c];
      }
    }
  };
  parallel_for((shared ? 1 : problem.batch) * blocks,
               maximum(GRAIN / (count * (terms + LANES) + 1), 1), body);
}

template <typename Format>
void backward(const Problem& problem, const Backward& arguments) {
  using Element = typename Format::Element;
  const Partials partials(problem, backward_grid(problem));
  const int64_t taps = number_of_taps(problem);
  backward_tiles<Format>(problem, arguments);
  if (arguments.grad_weight != nullptr) {
    finish<Format>(problem, partials, arguments.workspace, 0, taps, problem.shared_weight,
                   static_cast<Element*>(arguments.grad_weight));
  }
  if (arguments.grad_bias != nullptr) {
    finish<Format>(problem, partials, arguments.workspace, taps, 1, problem.shared_bias,
                   static_cast<Element*>(arguments.grad_bias));
  }
}

}  // namespace

int64_t workspace_floats(const Problem& problem) {
  return Partials(problem, backward_grid(problem)).floats(problem);
}

void forward(const Problem& problem, const void* input, const void* weight, const void* bias,
             void* output) {
  switch (problem.dtype) {
    case DType::float32: return forward_tiles<Float32>(problem, input, weight, bias, output);
    case DType::float16: return forward_tiles<Float16>(problem, input, weight, bias, output);
    case DType::bfloat16: return forward_tiles<BFloat16>(problem, input, weight, bias, output);
  }
}

void backward(const Problem& problem, const Backward& arguments) {
  switch (problem.dtype) {
    case DType::float32: return backward<Float32>(problem, arguments);
    case DType::float16: return backward<Float16>(problem, arguments);
    case DType::bfloat16: return backward<BFloat16>(problem, arguments);
  }
}

}  // namespace vfmk::dynamic_depthwise_conv2d::cpu::VFMK_ISA
