// Convolution with a dense kernel set for each sample, on the CPU.
//
// A work item is a tile of one sample. Its input, with the halo, is packed as fp32 [row][column][c]
// with zeros outside the plane. The kw columns under a row of the kernel then lie one after the
// other, and the columns of the next pixel overlap them. So without any copy for each tap, a row of
// pixels is the left factor of a product for each row i of the kernel:
//
//   forward      output[x][o]      += sum over (j,c) of input[x][(j,c)] * weight[i][(j,c)][o]
//   grad_input   the same, from grad_output, with taps flipped and channels exchanged
//   grad_weight  grad[i][o][(j,c)] += sum over x of grad_output[x][o] * input[x][(j,c)]
//
// (dilated: a product for each tap). The first two sum over all taps in registers
// (dynamic_conv2d_tile.h), grad_weight for each row of pixels (matrix.h). The factor that all
// pixels share, 36 KiB at C = O = 32 and k = 3, streams from the first caches, the tile from the
// second. NCHW is transposed on the way in and out, 1/4 of a cycle an element. Where the machine
// multiplies pairs of bf16, those are packed instead, except for grad_weight.
//
// A tile's sums of grad_weight are added to those of its chunk, a run of tiles of one sample, and
// chunks are added up in order. Tiles and chunks follow from the problem alone, not from the number
// of threads.
//
// N = H*W pixels of B samples, s bytes an element: forward is 2 k^2 C O N B FLOP, reads
// (C N + O C k^2) B s bytes and writes O N B s; backward is twice the FLOP, reads
// ((C + O) N + O C k^2) B s and writes (C N + O C k^2) B s. The floor is the rate of the
// multiply-add units. Measured with AVX-512 in fp32, C = O = 32, k = 3, 64x64, B = 1,
// channels-last, one thread: forward 235 of 264 GFLOP/s, grad_weight 209; in bf16 forward 397.
#include "../dynamic_conv2d.h"

#include <type_traits>

#include "../parallel.h"
#include "dynamic_conv2d_tile.h"
#include "integers.h"
#include "matrix.h"
#include "vector.h"

namespace vfmk::dynamic_conv2d::cpu::VFMK_ISA {
namespace {

constexpr int64_t TILE_COLUMNS = 96;      // at most; TILE_ROWS divides it
constexpr int64_t TILE_FLOATS = 1 << 15;  // 128 KiB of packed pixels without the halo
constexpr int64_t WEIGHT_GRADIENTS = 16;  // chunks that make enough work items
constexpr int64_t GRAIN = 1 << 16;        // multiply-adds of vectors, about 10 us

// Channels as they are packed: a product needs an even number, and more than none.
int64_t packed_channels(int64_t channels) { return maximum(round_up(channels, 2), 2); }

// The gradient of the input is a convolution of grad_output.
Problem transposed(const Problem& problem) {
  Problem other = problem;
  other.channels = problem.output_channels;
  other.output_channels = problem.channels;
  other.input_height = problem.output_height;
  other.input_width = problem.output_width;
  other.output_height = problem.input_height;
  other.output_width = problem.input_width;
  other.pad_top = (problem.kernel_height - 1) * problem.dilation_height - problem.pad_top;
  other.pad_left = (problem.kernel_width - 1) * problem.dilation_width - problem.pad_left;
  other.input = problem.output;
  other.output = problem.grad_input;
  return other;
}

// The output plane cut into tiles.
struct Tiles {
  int64_t height, width;  // of one tile
  int64_t down, right;    // tiles in a plane

  explicit Tiles(const Problem& problem) {
    const int64_t channels = maximum(problem.channels, problem.output_channels);
    right = ceil_div(problem.output_width, TILE_COLUMNS);
    width = ceil_div(problem.output_width, maximum(right, 1));
    const int64_t row = maximum(width * channels, 1);
    const int64_t most = maximum(TILE_FLOATS / row, 1);
    down = ceil_div(problem.output_height, most);
    height = ceil_div(problem.output_height, maximum(down, 1));
  }
  int64_t per_plane() const { return down * right; }
};

// Pixels [top, top + rows) x [left, left + columns) of the output plane of one sample.
struct Tile {
  int64_t top, left, rows, columns;

  Tile(const Problem& problem, const Tiles& tiles, int64_t index) {
    top = index / tiles.right * tiles.height;
    left = index % tiles.right * tiles.width;
    rows = minimum(tiles.height, problem.output_height - top);
    columns = minimum(tiles.width, problem.output_width - left);
  }
};

// The rows and columns of taps as products see them: those of `run` taps side by side are one.
struct Taps {
  int64_t run, rows, runs;     // runs in a row
  int64_t row_step, run_step;  // in the input, in pixels

  explicit Taps(const Problem& problem) {
    run = problem.dilation_width == 1 ? problem.kernel_width : 1;
    rows = problem.kernel_height;
    runs = problem.kernel_width / run;
    row_step = problem.dilation_height;
    run_step = problem.dilation_width;
  }
  int64_t number() const { return rows * runs * run; }
};

// Part of an image, packed as [row][column][channel] of a panel's units, with zeros outside the
// plane.
template <typename Panel>
struct Area {
  int64_t rows, columns, channels;
  float* data = nullptr;

  Area(int64_t rows, int64_t columns, int64_t channels)
      : rows(rows), columns(columns), channels(packed_channels(channels)) {}
  // What a tile of pixels and the taps reach.
  static Area around(const Problem& problem, const Tiles& tiles) {
    return Area(tiles.height + (problem.kernel_height - 1) * problem.dilation_height,
                tiles.width + (problem.kernel_width - 1) * problem.dilation_width,
                problem.channels);
  }
  // Products read up to a pixel and a vector beyond.
  int64_t floats() const { return round_up((rows * columns + 1) * units() + LANES, LANES); }
  int64_t units() const { return channels / Panel::CHANNELS; }  // of a pixel
  const float* at(int64_t row, int64_t column) const {
    return data + (row * columns + column) * units();
  }

  // From the plane of height x width, of which (top, left) is the pixel at data.
  template <typename Format>
  void pack(const typename Format::Element* plane, const Strides& strides, int64_t present,
            int64_t height, int64_t width, int64_t top, int64_t left) const {
    using PackedElement = typename Panel::Format::Element;
    const Area area = *this;  // a store might change a member, for all that the compiler knows
    const int64_t begin = clamp(-left, 0, area.columns);
    const int64_t end = clamp(width - left, begin, area.columns);
    for (int64_t r = 0; r < area.rows; ++r) {
      auto* to = reinterpret_cast<PackedElement*>(area.data) + r * area.columns * area.channels;
      const int64_t y = top + r;
      if (y < 0 || y >= height || begin == end || present == 0) {
        std::memset(to, 0, area.columns * area.channels * sizeof(PackedElement));
        continue;
      }
      std::memset(to, 0, begin * area.channels * sizeof(PackedElement));
      std::memset(to + end * area.channels, 0,
                  (area.columns - end) * area.channels * sizeof(PackedElement));
      const auto* from = plane + y * strides.row + left * strides.column;
      for (int64_t c = 0; c < area.channels; c += LANES) {
        const int64_t from_channels = present - c, to_channels = area.channels - c;
        if (strides.channel == 1) {
          for (int64_t x = begin; x < end; ++x) {
            store<typename Panel::Format>(
                to + x * area.channels + c,
                load<Format>(from + x * strides.column + c, maximum(from_channels, 0)),
                to_channels);
          }
          continue;
        }
        for (int64_t x = begin; x < end; x += LANES) {
          Vec block[LANES];
          for (int64_t i = 0; i < LANES; ++i) {
            block[i] = i < from_channels
                           ? load<Format>(from + (c + i) * strides.channel + x, end - x)
                           : Vec{};
          }
          transpose(block);
          for (int64_t i = 0; i < minimum(LANES, end - x); ++i) {
            store<typename Panel::Format>(to + (x + i) * area.channels + c, block[i], to_channels);
          }
        }
      }
    }
  }
};

// weight [O][C][taps] as [tap][input channel][output channel], the channels of a unit side by
// side; for the gradient of the input, `problem` is transposed: taps are flipped, and its output
// channels are those of the input.
template <typename Format, typename Panel>
void pack_weight(const Problem& problem, bool flipped, const typename Format::Element* weight,
                 float* staging, float* packed) {
  const int64_t taps = Taps(problem).number();
  const int64_t inputs = problem.channels, outputs = problem.output_channels;
  const int64_t output_step = flipped ? taps : inputs * taps;
  const int64_t input_step = flipped ? outputs * taps : taps;
  const int64_t total = taps * inputs * outputs;
  for (int64_t i = 0; i < total; i += LANES) {
    store<Float32>(staging + i, load<Format>(weight + i, total - i));
  }
  const int64_t padded = packed_channels(inputs), row = round_up(outputs, LANES);
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t c = 0; c < padded; c += Panel::CHANNELS, packed += row) {
      auto* to = reinterpret_cast<typename Panel::Format::Element*>(packed);
      const float* from = staging + c * input_step + (flipped ? taps - 1 - tap : tap);
      for (int64_t o = 0; o < row; ++o) {
        for (int64_t i = 0; i < Panel::CHANNELS; ++i) {
          const bool present = c + i < inputs && o < outputs;
          Panel::put(to++, present ? from[o * output_step + i * input_step] : 0.0f);
        }
      }
    }
  }
}

// A row of `columns` pixels of sums [x][round_up(O, LANES)] into the image at `to`.
template <typename Format>
void write_row(const Problem& problem, const float* sums, int64_t columns,
               typename Format::Element* to) {
  const Strides& strides = problem.output;
  const int64_t channels = problem.output_channels, row = round_up(channels, LANES);
  for (int64_t c = 0; c < channels; c += LANES) {
    if (strides.channel == 1) {
      for (int64_t x = 0; x < columns; ++x) {
        store<Format>(to + x * strides.column + c, load<Float32>(sums + x * row + c), channels - c);
      }
      continue;
    }
    for (int64_t x = 0; x < columns; x += LANES) {
      Vec block[LANES];
      for (int64_t i = 0; i < LANES; ++i) block[i] = load<Float32>(sums + (x + i) * row + c);
      transpose(block);
      for (int64_t i = 0; i < minimum(LANES, channels - c); ++i) {
        store<Format>(to + (c + i) * strides.channel + x, block[i], columns - x);
      }
    }
  }
}

template <typename Format, typename Panel>
void convolve(const Problem& problem, bool flipped, const typename Format::Element* input,
              const typename Format::Element* weight, const typename Format::Element* bias,
              typename Format::Element* output) {
  const Tiles tiles(problem);
  const Taps taps(problem);
  const int64_t row = round_up(problem.output_channels, LANES);
  const Area<Panel> shape = Area<Panel>::around(problem, tiles);
  const int64_t weights = taps.number() * shape.units() * row;
  const int64_t in_memory = taps.number() * problem.channels * problem.output_channels;
  const Reach reach = {taps.rows, taps.runs, taps.run * shape.units(),
                       taps.row_step * shape.columns * shape.units(),
                       taps.run_step * shape.units()};
  const int64_t sums_floats = (tiles.width + LANES) * row;

  const auto body = [&](int64_t begin, int64_t end) {
    // Per thread: packed weight | its staging | bias | sums | area.
    float* memory =
        thread_scratch(weights + round_up(in_memory, LANES) + row + sums_floats + shape.floats());
    float* packed = memory;
    float* staging = packed + weights;
    float* packed_bias = staging + round_up(in_memory, LANES);
    float* sums = packed_bias + row;
    Area<Panel> x = shape;
    x.data = sums + sums_floats;
    int64_t packed_batch = -1;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t batch = index / tiles.per_plane();
      const Tile tile(problem, tiles, index % tiles.per_plane());
      if (batch != packed_batch) {
        pack_weight<Format, Panel>(problem, flipped,
                                   weight + (problem.shared_weight ? 0 : batch) * in_memory,
                                   staging, packed);
        const int64_t first = (problem.shared_bias ? 0 : batch) * problem.output_channels;
        for (int64_t o = 0; o < row; o += LANES) {
          const Vec start =
              bias == nullptr ? Vec{} : load<Format>(bias + first + o, problem.output_channels - o);
          store<Float32>(packed_bias + o, start);
        }
        packed_batch = batch;
      }
      x.template pack<Format>(input + batch * problem.input.batch, problem.input, problem.channels,
                              problem.input_height, problem.input_width, tile.top - problem.pad_top,
                              tile.left - problem.pad_left);
      auto* to = output + batch * problem.output.batch + tile.left * problem.output.column;
      for (int64_t y = 0; y < tile.rows; ++y) {
        convolve_row<Panel>(round_up(tile.columns, 2), reach, x.at(y, 0), x.units(), packed,
                            packed_bias, sums, row);
        write_row<Format>(problem, sums, tile.columns, to + (tile.top + y) * problem.output.row);
      }
    }
  };
  const int64_t work = tiles.height * tiles.width * weights / LANES;
  parallel_for(problem.batch * tiles.per_plane(), maximum(GRAIN / maximum(work, 1), 1), body);
}

template <typename Format>
void convolve(const Problem& problem, bool flipped, const typename Format::Element* input,
              const typename Format::Element* weight, const typename Format::Element* bias,
              typename Format::Element* output) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Format, BFloat16>) {
    if (Pairs::supported()) {
      return convolve<Format, Pairs>(problem, flipped, input, weight, bias, output);
    }
  }
#endif
  convolve<Format, Singles>(problem, flipped, input, weight, bias, output);
}

// The sums of one chunk: of grad_weight [run of taps][o][(tap in run, c)], and of grad_bias [o].
struct Sums {
  int64_t chunks;  // of a sample
  int64_t output_rows, row, of_weight, total;

  Sums(const Problem& problem, const Tiles& tiles) {
    const Taps taps(problem);
    chunks = clamp(ceil_div(WEIGHT_GRADIENTS, maximum(problem.batch, 1)), 1,
                   maximum(tiles.per_plane(), 1));
    output_rows = packed_channels(problem.output_channels);
    row = round_up(taps.run * packed_channels(problem.channels), LANES);
    of_weight = taps.rows * taps.runs * output_rows * row;
    total = of_weight + round_up(output_rows, LANES);
  }
};

// The gradients of weight and bias, in workspace[batch][chunk][sum].
template <typename Format>
void sum_gradients(const Problem& problem, const Backward& arguments) {
  using Element = typename Format::Element;
  const auto* grad_output = static_cast<const Element*>(arguments.grad_output);
  const auto* input = static_cast<const Element*>(arguments.input);
  const Tiles tiles(problem);
  const Taps taps(problem);
  const Sums layout(problem, tiles);
  const auto input_area = Area<Singles>::around(problem, tiles);
  const Area<Singles> gradient_area(tiles.height, tiles.width, problem.output_channels);

  const auto body = [&](int64_t begin, int64_t end) {
    float* memory = thread_scratch(input_area.floats() + gradient_area.floats());
    Area<Singles> x = input_area, g = gradient_area;
    x.data = memory;
    g.data = memory + x.floats();
    for (int64_t index = begin; index < end; ++index) {
      const int64_t batch = index / layout.chunks, chunk = index % layout.chunks;
      float* sums = arguments.workspace + index * layout.total;
      float* bias_sums = sums + layout.of_weight;
      std::memset(sums, 0, layout.total * sizeof(float));
      const int64_t last = (chunk + 1) * tiles.per_plane() / layout.chunks;
      for (int64_t t = chunk * tiles.per_plane() / layout.chunks; t < last; ++t) {
        const Tile tile(problem, tiles, t);
        g.pack<Format>(grad_output + batch * problem.output.batch, problem.output,
                       problem.output_channels, problem.output_height, problem.output_width,
                       tile.top, tile.left);
        if (arguments.grad_weight != nullptr) {
          x.pack<Format>(input + batch * problem.input.batch, problem.input, problem.channels,
                         problem.input_height, problem.input_width, tile.top - problem.pad_top,
                         tile.left - problem.pad_left);
          for (int64_t n = 0; n < taps.rows * taps.runs; ++n) {
            for (int64_t y = 0; y < tile.rows; ++y) {
              multiply<Start::sum>(
                  layout.output_rows, layout.row / LANES, tile.columns, {g.at(y, 0), 1, g.channels},
                  {x.at(y + n / taps.runs * taps.row_step, n % taps.runs * taps.run_step),
                   x.channels},
                  sums + n * layout.output_rows * layout.row, layout.row);
            }
          }
        }
        if (arguments.grad_bias != nullptr) {
          for (int64_t o = 0; o < g.channels; o += LANES) {
            Vec total = {};
            for (int64_t y = 0; y < tile.rows; ++y) {
              Vec row_total = {};
              for (int64_t c = 0; c < tile.columns; ++c) {
                row_total += load<Float32>(g.at(y, c) + o, g.channels - o);
              }
              total += row_total;
            }
            store<Float32>(bias_sums + o, load<Float32>(bias_sums + o) + total);
          }
        }
      }
    }
  };
  const int64_t work = ceil_div(tiles.per_plane(), layout.chunks) * tiles.height * tiles.width *
                       layout.of_weight / LANES;
  parallel_for(problem.batch * layout.chunks, maximum(GRAIN / maximum(work, 1), 1), body);
}

// Adds up rows of the chunks' sums, over the batch as well where it shares them, and hands each on:
// write(batch, row, n, values) for values n to n + LANES of a row, encoded.
template <typename Format, typename Write>
void add_up(const Problem& problem, const float* workspace, bool shared, int64_t first,
            int64_t rows, int64_t row, const Write& write) {
  const Sums layout(problem, Tiles(problem));
  const int64_t parts = layout.chunks * (shared ? problem.batch : 1);
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t batch = index / rows;
      const float* from =
          workspace + batch * layout.chunks * layout.total + first + index % rows * row;
      for (int64_t n = 0; n < row; n += LANES) {
        Vec sum = {};
        for (int64_t part = 0; part < parts; ++part) {
          sum += load<Float32>(from + part * layout.total + n);
        }
        typename Format::Element values[LANES];
        store<Format>(values, sum);
        write(batch, index % rows, n, values);
      }
    }
  };
  parallel_for((shared ? 1 : problem.batch) * rows, maximum(GRAIN / maximum(parts * row, 1), 1),
               body);
}

template <typename Format>
void backward_passes(const Problem& problem, const Backward& arguments) {
  using Element = typename Format::Element;
  if (arguments.grad_input != nullptr) {
    Problem other = transposed(problem);
    convolve<Format>(other, true, static_cast<const Element*>(arguments.grad_output),
                     static_cast<const Element*>(arguments.weight), nullptr,
                     static_cast<Element*>(arguments.grad_input));
  }
  if (arguments.grad_weight == nullptr && arguments.grad_bias == nullptr) return;
  sum_gradients<Format>(problem, arguments);
  const Sums layout(problem, Tiles(problem));
  const int64_t inputs = problem.channels, outputs = problem.output_channels;
  if (auto* gradient = static_cast<Element*>(arguments.grad_weight)) {
    const Taps taps(problem);
    const int64_t number = taps.number(), channels = packed_channels(inputs);
    add_up<Format>(problem, arguments.workspace, problem.shared_weight, 0,
                   taps.rows * taps.runs * layout.output_rows, layout.row,
                   [&](int64_t batch, int64_t row, int64_t n, const Element* values) {
                     const int64_t o = row % layout.output_rows;
                     if (o >= outputs) return;
                     const int64_t first_tap = row / layout.output_rows * taps.run;
                     Element* to = gradient + (batch * outputs + o) * inputs * number + first_tap;
                     const int64_t count = minimum(taps.run * channels - n, LANES);
                     int64_t tap = n / channels, c = n % channels;
                     for (int64_t i = 0; i < count; ++i) {
                       if (c < inputs) to[c * number + tap] = values[i];
                       if (++c == channels) c = 0, ++tap;
                     }
                   });
  }
  if (auto* gradient = static_cast<Element*>(arguments.grad_bias)) {
    add_up<Format>(problem, arguments.workspace, problem.shared_bias, layout.of_weight, 1,
                   round_up(layout.output_rows, LANES),
                   [&](int64_t batch, int64_t, int64_t n, const Element* values) {
                     const int64_t count = minimum(outputs - n, LANES);
                     for (int64_t i = 0; i < count; ++i) {
                       gradient[batch * outputs + n + i] = values[i];
                     }
                   });
  }
}

}  // namespace

int64_t workspace_floats(const Problem& problem) {
  const Sums layout(problem, Tiles(problem));
  return problem.batch * layout.chunks * layout.total;
}

void forward(const Problem& problem, const void* input, const void* weight, const void* bias,
             void* output) {
  with_format(problem.dtype, [&](auto format) {
    using Format = decltype(format);
    using Element = typename Format::Element;
    convolve<Format>(problem, false, static_cast<const Element*>(input),
                     static_cast<const Element*>(weight), static_cast<const Element*>(bias),
                     static_cast<Element*>(output));
  });
}

void backward(const Problem& problem, const Backward& arguments) {
  with_format(problem.dtype,
              [&](auto format) { backward_passes<decltype(format)>(problem, arguments); });
}

}  // namespace vfmk::dynamic_conv2d::cpu::VFMK_ISA
