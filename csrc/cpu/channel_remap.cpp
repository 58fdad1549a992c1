// Channels in another order, scaled, on the CPU.
//
// A vector holds LANES pixels of one channel. In NCHW they are read in place. In channels-last
// backward they are transposed on the way in and out, LANES pixels at a time, through planes that
// stay in the first-level cache; channels-last forward moves vectors of channels instead, where
// neighbours stay neighbours (most of a map that exchanges a few), and single elements where not.
//
// Backward gathers: each input channel adds up its readers in ascending order and is written once.
// A reader's share of grad_scale is summed at the same time, over one item, in LANES lanes; the
// items' sums are added in a fixed order. Items follow from the problem alone: the result does not
// depend on the number of threads.
//
// Memory, for N elements of s bytes in and out: forward 2Ns; backward 2Ns, with grad_scale 3Ns.
#include "../channel_remap.h"

#include <cstring>

#include "../parallel.h"
#include "integers.h"
#include "vector.h"

namespace vfmk::channel_remap::cpu::VFMK_ISA {
namespace {

constexpr int64_t GRAIN = 1 << 15;  // elements that are worth a thread
constexpr int64_t PIXELS = 512;     // of a channels-last item
constexpr int BLOCK = 8;            // vectors of one channel between two uses of its readers

int64_t grain(int64_t elements) { return ceil_div(GRAIN, elements + 1); }

// Consecutive pixels of one sample's row in a channels-last problem.
struct Pixels {
  int64_t sample, row, column, count;

  static int64_t chunks(const Problem& problem) {
    return problem.rows * ceil_div(problem.columns, PIXELS);
  }
  Pixels(const Problem& problem, int64_t item) {
    const int64_t across = ceil_div(problem.columns, PIXELS);
    sample = item / (problem.rows * across);
    row = item / across % problem.rows;
    column = item % across * PIXELS;
    count = minimum(problem.columns - column, PIXELS);
  }
  template <typename Element>
  Element* at(Element* data, const Strides& strides) const {
    return data + sample * strides.batch + row * strides.row + column * strides.column;
  }
};

template <typename Format>
float element(const typename Format::Element* data, int64_t at) {
  return data == nullptr ? 1.0f : load<Format>(data + at, 1)[0];
}

template <typename Format>
void forward_planes(const Problem& problem, const Forward& arguments) {
  using Element = typename Format::Element;
  const auto* scale = static_cast<const Element*>(arguments.scale);
  const int64_t items = problem.maps * problem.samples * problem.output_channels;
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sample = item / problem.output_channels;
      const int64_t channel = item % problem.output_channels;
      const int64_t entry = sample / problem.samples * problem.output_channels + channel;
      const auto* from = static_cast<const Element*>(arguments.input) +
                         sample * problem.input.batch +
                         arguments.index[entry] * problem.input.channel;
      auto* to = static_cast<Element*>(arguments.output) + sample * problem.output.batch +
                 channel * problem.output.channel;
      const float factor = element<Format>(scale, entry);
      for (int64_t row = 0; row < problem.rows; ++row) {
        if (scale == nullptr) {
          std::memcpy(to, from, problem.columns * sizeof(Element));
        } else {
          for (int64_t x = 0; x < problem.columns; x += LANES) {
            const int64_t rest = problem.columns - x;
            store<Format>(to + x, load<Format>(from + x, rest) * factor, rest);
          }
        }
        from += problem.input.row;
        to += problem.output.row;
      }
    }
  };
  parallel_for(items, grain(problem.rows * problem.columns), body);
}

// first[v]: the channel from which on vector v of the output reads LANES neighbours, or -1.
void find_neighbours(const Problem& problem, const int64_t* index, int64_t* first) {
  for (int64_t v = 0, c = 0; c < problem.output_channels; ++v, c += LANES) {
    const int64_t lanes = minimum(problem.output_channels - c, LANES);
    first[v] = index[c];
    for (int64_t lane = 1; lane < lanes; ++lane) {
      if (index[c + lane] != index[c] + lane) first[v] = -1;
    }
  }
}

template <typename Format, bool SCALED>
void forward_pixels(const Problem& problem, const Forward& arguments) {
  using Element = typename Format::Element;
  const int64_t vectors = ceil_div(problem.output_channels, LANES);
  const int64_t items = problem.maps * problem.samples * Pixels::chunks(problem);
  const auto body = [&](int64_t begin, int64_t end) {
    auto* first = reinterpret_cast<int64_t*>(thread_scratch(2 * vectors));
    int64_t known = -1;
    for (int64_t item = begin; item < end; ++item) {
      const Pixels pixels(problem, item);
      const int64_t map = pixels.sample / problem.samples;
      const int64_t* index = arguments.index + map * problem.output_channels;
      if (map != known) find_neighbours(problem, index, first);
      known = map;
      const auto* scale = static_cast<const Element*>(arguments.scale) +
                          (SCALED ? map * problem.output_channels : 0);
      const auto* from = pixels.at(static_cast<const Element*>(arguments.input), problem.input);
      auto* to = pixels.at(static_cast<Element*>(arguments.output), problem.output);
      for (int64_t pixel = 0; pixel < pixels.count; ++pixel) {
        for (int64_t v = 0, c = 0; v < vectors; ++v, c += LANES) {
          const int64_t lanes = minimum(problem.output_channels - c, LANES);
          Element gathered[LANES] = {};
          const Element* source = from + first[v];
          if (first[v] < 0) {
            for (int64_t lane = 0; lane < lanes; ++lane) gathered[lane] = from[index[c + lane]];
            source = gathered;
          }
          Vec value = load<Format>(source, lanes);
          if constexpr (SCALED) value *= load<Format>(scale + c, lanes);
          store<Format>(to + c, value, lanes);
        }
        from += problem.input.column;
        to += problem.output.column;
      }
    }
  };
  parallel_for(items, grain(PIXELS * problem.output_channels), body);
}

// A map's inverse: the readers of channel c are readers[starts[c]] ... readers[starts[c + 1] - 1].
struct Inverse {
  int32_t* starts;   // [input_channels + 1]
  int32_t* readers;  // [output_channels]

  static int64_t words(const Problem& problem) {
    return problem.input_channels + 1 + problem.output_channels;
  }
  Inverse(const Problem& problem, void* workspace, int64_t map)
      : starts(static_cast<int32_t*>(workspace) + map * words(problem)),
        readers(starts + problem.input_channels + 1) {}

  void count(const Problem& problem, const int64_t* index) const {
    for (int64_t c = 0; c <= problem.input_channels; ++c) starts[c] = 0;
    for (int64_t c = 0; c < problem.output_channels; ++c) ++starts[index[c] + 1];
    for (int64_t c = 0; c < problem.input_channels; ++c) starts[c + 1] += starts[c];
    for (int64_t c = 0; c < problem.output_channels; ++c) readers[starts[index[c]]++] = c;
    for (int64_t c = problem.input_channels; c > 0; --c) starts[c] = starts[c - 1];
    starts[0] = 0;
  }
};

// Sums of grad_scale: workspace[sample][part][output channel], after the inverses.
int64_t parts(const Problem& problem) {
  return problem.channels_last ? Pixels::chunks(problem) : 1;
}
float* sums_of(const Problem& problem, void* workspace, int64_t part) {
  return static_cast<float*>(workspace) + problem.maps * Inverse::words(problem) +
         part * problem.output_channels;
}

// Adds up the readers of one channel over `count` vectors: one channel's gradient. `grad_output(r,
// p)` is reader r's vector p, `input(p)` the channel's own; sums[r] grows by their product if
// WITH_SUMS.
template <bool WITH_SUMS, int COUNT, typename GradOutput, typename Input, typename Scale>
__attribute__((always_inline)) inline void add_readers(const int32_t* reader, const int32_t* end,
                                                       const GradOutput& grad_output,
                                                       const Input& input, const Scale& scale,
                                                       Vec* sums, Vec (&total)[COUNT]) {
  Vec own[COUNT];
#pragma GCC unroll 8
  for (int p = 0; p < COUNT; ++p) {
    total[p] = Vec{};
    if (WITH_SUMS) own[p] = input(p);
  }
  for (; reader < end; ++reader) {
    const float factor = scale(*reader);
    Vec products = {};
#pragma GCC unroll 8
    for (int p = 0; p < COUNT; ++p) {
      const Vec gradient = grad_output(*reader, p);
      total[p] += factor * gradient;
      if (WITH_SUMS) products += gradient * own[p];
    }
    if (WITH_SUMS) sums[*reader] += products;
  }
}

template <typename Format, bool WITH_SUMS>
void backward_planes(const Problem& problem, const Backward& arguments) {
  using Element = typename Format::Element;
  const auto* scale = static_cast<const Element*>(arguments.scale);
  const int64_t items = problem.maps * problem.samples * problem.input_channels;
  const auto body = [&](int64_t begin, int64_t end) {
    Vec* sums = reinterpret_cast<Vec*>(thread_scratch(problem.output_channels * LANES));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sample = item / problem.input_channels;
      const int64_t channel = item % problem.input_channels;
      const int64_t map = sample / problem.samples;
      const Inverse inverse(problem, arguments.workspace, map);
      const int32_t* first = inverse.readers + inverse.starts[channel];
      const int32_t* last = inverse.readers + inverse.starts[channel + 1];
      const auto* gradients =
          static_cast<const Element*>(arguments.grad_output) + sample * problem.output.batch;
      const auto* own =
          static_cast<const Element*>(arguments.input) +
          (WITH_SUMS ? sample * problem.input.batch + channel * problem.input.channel : 0);
      auto* to = static_cast<Element*>(arguments.grad_input);
      if (to != nullptr) {
        to += sample * problem.grad_input.batch + channel * problem.grad_input.channel;
      }
      for (const int32_t* r = first; r < last; ++r) sums[*r] = Vec{};
      const auto factor = [&](int64_t reader) {
        return element<Format>(scale, map * problem.output_channels + reader);
      };
      for (int64_t row = 0; row < problem.rows; ++row) {
        for (int64_t x = 0; x < problem.columns;) {
          const int64_t rest = problem.columns - x;
          const auto input = [&](int p) {
            return load<Format>(own + row * problem.input.row + x + p * LANES, rest);
          };
          const auto grad_output = [&](int64_t reader, int p) {
            return load<Format>(gradients + reader * problem.output.channel +
                                    row * problem.output.row + x + p * LANES,
                                rest);
          };
          Element* target = to == nullptr ? nullptr : to + row * problem.grad_input.row + x;
          if (rest >= BLOCK * LANES) {
            Vec total[BLOCK];
            add_readers<WITH_SUMS>(first, last, grad_output, input, factor, sums, total);
            if (target != nullptr) {
#pragma GCC unroll 8
              for (int p = 0; p < BLOCK; ++p) {
                store<Format>(target + p * LANES, total[p]);
              }
            }
            x += BLOCK * LANES;
          } else {
            Vec total[1];
            add_readers<WITH_SUMS>(first, last, grad_output, input, factor, sums, total);
            if (target != nullptr) store<Format>(target, total[0], rest);
            x += LANES;
          }
        }
      }
      if (WITH_SUMS) {
        for (const int32_t* r = first; r < last; ++r) {
          sums_of(problem, arguments.workspace, sample)[*r] = sum_of_lanes(sums[*r]);
        }
      }
    }
  };
  parallel_for(items, grain(problem.rows * problem.columns), body);
}

// LANES pixels of all channels as planes[channel]; pixels from `count` on are zeros.
template <typename Format>
void load_planes(const typename Format::Element* from, int64_t step, int64_t count,
                 int64_t channels, Vec* planes) {
  for (int64_t c = 0; c < channels; c += LANES) {
    Vec square[LANES];
#pragma GCC unroll 16
    for (int pixel = 0; pixel < LANES; ++pixel) {
      square[pixel] = pixel < count ? load<Format>(from + pixel * step + c, channels - c) : Vec{};
    }
    transpose(square);
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; ++lane) planes[c + lane] = square[lane];
  }
}

template <typename Format>
void store_planes(typename Format::Element* to, int64_t step, int64_t count, int64_t channels,
                  const Vec* planes) {
  for (int64_t c = 0; c < channels; c += LANES) {
    Vec square[LANES];
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; ++lane) square[lane] = planes[c + lane];
    transpose(square);
#pragma GCC unroll 16
    for (int pixel = 0; pixel < LANES; ++pixel) {
      if (pixel < count) store<Format>(to + pixel * step + c, square[pixel], channels - c);
    }
  }
}

template <typename Format, bool WITH_SUMS>
void backward_pixels(const Problem& problem, const Backward& arguments) {
  using Element = typename Format::Element;
  const auto* scale = static_cast<const Element*>(arguments.scale);
  const int64_t inputs = ceil_div(problem.input_channels, LANES) * LANES;
  const int64_t outputs = ceil_div(problem.output_channels, LANES) * LANES;
  const auto body = [&](int64_t begin, int64_t end) {
    // Per thread: planes of grad_output | planes of the input, then of grad_input | sums | scale.
    Vec* gradients =
        reinterpret_cast<Vec*>(thread_scratch((2 * outputs + inputs) * LANES + outputs));
    Vec* planes = gradients + outputs;
    Vec* sums = planes + inputs;
    float* factors = reinterpret_cast<float*>(sums + outputs);
    for (int64_t item = begin; item < end; ++item) {
      const Pixels pixels(problem, item);
      const int64_t map = pixels.sample / problem.samples;
      const Inverse inverse(problem, arguments.workspace, map);
      for (int64_t c = 0; c < problem.output_channels; ++c) {
        factors[c] = element<Format>(scale, map * problem.output_channels + c);
        sums[c] = Vec{};
      }
      const auto* from =
          pixels.at(static_cast<const Element*>(arguments.grad_output), problem.output);
      const auto* own = WITH_SUMS
                            ? pixels.at(static_cast<const Element*>(arguments.input), problem.input)
                            : nullptr;
      auto* to = arguments.grad_input == nullptr
                     ? nullptr
                     : pixels.at(static_cast<Element*>(arguments.grad_input), problem.grad_input);
      for (int64_t pixel = 0; pixel < pixels.count; pixel += LANES) {
        const int64_t count = minimum(pixels.count - pixel, LANES);
        load_planes<Format>(from + pixel * problem.output.column, problem.output.column, count,
                            problem.output_channels, gradients);
        if (WITH_SUMS) {
          load_planes<Format>(own + pixel * problem.input.column, problem.input.column, count,
                              problem.input_channels, planes);
        }
        for (int64_t c = 0; c < problem.input_channels; ++c) {
          Vec total[1];
          add_readers<WITH_SUMS>(
              inverse.readers + inverse.starts[c], inverse.readers + inverse.starts[c + 1],
              [&](int64_t reader, int) { return gradients[reader]; },
              [&](int) { return planes[c]; }, [&](int64_t reader) { return factors[reader]; }, sums,
              total);
          planes[c] = total[0];
        }
        if (to != nullptr) {
          store_planes<Format>(to + pixel * problem.grad_input.column, problem.grad_input.column,
                               count, problem.input_channels, planes);
        }
      }
      if (WITH_SUMS) {
        for (int64_t c = 0; c < problem.output_channels; ++c) {
          sums_of(problem, arguments.workspace, item)[c] = sum_of_lanes(sums[c]);
        }
      }
    }
  };
  parallel_for(problem.maps * problem.samples * Pixels::chunks(problem),
               grain(PIXELS * problem.output_channels), body);
}

// grad_scale[map][channel] from the sums of the map's samples.
template <typename Format>
void add_sums(const Problem& problem, const Backward& arguments) {
  using Element = typename Format::Element;
  const int64_t count = problem.samples * parts(problem);
  for (int64_t map = 0; map < problem.maps; ++map) {
    for (int64_t c = 0; c < problem.output_channels; c += LANES) {
      const int64_t lanes = minimum(problem.output_channels - c, LANES);
      Vec total = {};
      for (int64_t part = map * count; part < (map + 1) * count; ++part) {
        total += load<Float32>(sums_of(problem, arguments.workspace, part) + c, lanes);
      }
      store<Format>(static_cast<Element*>(arguments.grad_scale) + map * problem.output_channels + c,
                    total, lanes);
    }
  }
}

template <typename Function>
void with_format(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float32:
      return function(Float32{});
    case DType::float16:
      return function(Float16{});
    case DType::bfloat16:
      return function(BFloat16{});
  }
}

}  // namespace

int64_t workspace_words(const Problem& problem) {
  return problem.maps * Inverse::words(problem) +
         problem.maps * problem.samples * parts(problem) * problem.output_channels;
}

void forward(const Problem& problem, const Forward& arguments) {
  with_format(problem.dtype, [&](auto format) {
    using Format = decltype(format);
    if (!problem.channels_last) return forward_planes<Format>(problem, arguments);
    if (arguments.scale == nullptr) return forward_pixels<Format, false>(problem, arguments);
    forward_pixels<Format, true>(problem, arguments);
  });
}

void backward(const Problem& problem, const Backward& arguments) {
  for (int64_t map = 0; map < problem.maps; ++map) {
    Inverse(problem, arguments.workspace, map)
        .count(problem, arguments.index + map * problem.output_channels);
  }
  with_format(problem.dtype, [&](auto format) {
    using Format = decltype(format);
    if (arguments.grad_scale == nullptr) {
      const auto run =
          problem.channels_last ? backward_pixels<Format, false> : backward_planes<Format, false>;
      return run(problem, arguments);
    }
    const auto run =
        problem.channels_last ? backward_pixels<Format, true> : backward_planes<Format, true>;
    run(problem, arguments);
    add_sums<Format>(problem, arguments);
  });
}

}  // namespace vfmk::channel_remap::cpu::VFMK_ISA
