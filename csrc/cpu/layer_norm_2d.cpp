// Layer norm over channels with a gather in its write, on the CPU.
//
// In NCHW a vector holds LANES pixels. A tile of all channels of PIXELS pixels is read once, as
// fp32 into scratch that stays in the second-level cache: planes of a power of two pixels meet in
// the same few sets of the cache, so that the tensor itself would not stay. Mean, then variance
// about it, then the output's channels in their order, each from the channel that it reads: the
// gather costs nothing.
//
// In channels-last a vector holds LANES channels of one pixel, and a pixel's row stays in the
// first-level cache. Pixels are read and written one after the other, which memory likes best; with
// a map, COUNT of them at a time are normalized into rows that stay there too, of which most
// channels are copied as they stand if most stay in place (as when a map overwrites a few), the
// others element by element.
//
// Backward sums each channel's readers in ascending order, and the means over the channels of that
// gradient, alone and times the normalized input, in the same pass; the tile, or the row, then
// gives grad_input. Sums for weight and bias are kept by parts of the pixels and added up in order.
// Parts follow from the problem alone: the result does not depend on the number of threads.
//
// Memory, for N elements of s bytes in and out: forward 2Ns and 8 bytes a pixel, backward 3Ns.
// Alone and against a copy that moves as much, on one AVX-512 thread with [1, 256, 64, 64] in fp32,
// all in the third-level cache: forward takes 2.5 times as long in NCHW and 2.7 in channels-last,
// backward 2.7 and 1.9; from memory, [8, 256, 64, 64], 2.3 and 1.3, 3.1 and 1.3. A map adds 2 % in
// NCHW; in channels-last, with ten channels moved, 20 %, and all channels moved double the time.
#include "../layer_norm_2d.h"

#include <cmath>
#include <cstring>

#include "../parallel.h"
#include "channel_map.h"

namespace vfmk::layer_norm_2d::cpu::VFMK_ISA {
namespace {

constexpr int VECTORS = 8;  // of pixels of a tile
constexpr int64_t PIXELS = VECTORS * LANES;
constexpr int64_t BLOCK = 16;      // that are summed up by themselves: long sums round more
constexpr int64_t PART_TILES = 2;  // at least
constexpr int64_t MOST_PARTS = 64;

Vec sqrt(Vec value) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)value);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)value);
#else
  for (int lane = 0; lane < LANES; ++lane) value[lane] = std::sqrt(value[lane]);
  return value;
#endif
}

using Tile = Pixels<PIXELS>;

int64_t tiles_of(const Problem& problem) { return problem.batch * Tile::chunks(problem); }

// Of a tile's first pixel in mean and rstd.
int64_t place_of(const Problem& problem, const Tile& tile) {
  return (tile.sample * problem.rows + tile.row) * problem.columns + tile.column;
}

// Lanes of vector v that `count` elements fill.
int64_t filled(int64_t count, int64_t v) { return clamp(count - v * LANES, 0, LANES); }

template <typename Format>
float element(const void* data, int64_t at) {
  return load<Format>(static_cast<const typename Format::Element*>(data) + at, 1)[0];
}

// total[v] = the sum of term(c, v) over the channels, which are visited in order.
template <typename Term>
__attribute__((always_inline)) inline void sum_channels(int64_t channels, Vec (&total)[VECTORS],
                                                        const Term& term) {
  for (Vec& sum : total) sum = Vec{};
  for (int64_t first = 0; first < channels; first += BLOCK) {
    Vec part[VECTORS] = {};
    for (int64_t c = first; c < minimum(first + BLOCK, channels); ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) part[v] += term(c, v);
    }
    for (int v = 0; v < VECTORS; ++v) total[v] += part[v];
  }
}

// One tile; WHOLE: of PIXELS pixels. `scale` and `shift` are in the output's order.
template <typename Format, bool WHOLE>
void forward_tile(const Problem& problem, const Forward& arguments, const Tile& tile,
                  const float* scale, const float* shift, float* values) {
  using Element = typename Format::Element;
  const auto count = [&](int64_t v) { return WHOLE ? LANES : filled(tile.count, v); };
  const auto* from = tile.at(static_cast<const Element*>(arguments.input), problem.input);
  Vec mean[VECTORS], rstd[VECTORS];
  sum_channels(problem.input_channels, mean, [&](int64_t c, int v) {
    const Vec value = load<Format>(from + c * problem.input.channel + v * LANES, count(v));
    store<Float32>(values + c * PIXELS + v * LANES, value);
    return value;
  });
  for (Vec& sum : mean) sum /= static_cast<float>(problem.input_channels);
  sum_channels(problem.input_channels, rstd, [&](int64_t c, int v) {
    const Vec centred = load<Float32>(values + c * PIXELS + v * LANES) - mean[v];
    return centred * centred;
  });
  const int64_t place = place_of(problem, tile);
  for (int v = 0; v < VECTORS; ++v) {
    const Vec variance = rstd[v] / static_cast<float>(problem.input_channels);
    rstd[v] = 1.0f / sqrt(variance + problem.eps);
    store<Float32>(arguments.mean + place + v * LANES, mean[v], count(v));
    store<Float32>(arguments.rstd + place + v * LANES, rstd[v], count(v));
  }
  auto* to = tile.at(static_cast<Element*>(arguments.output), problem.output);
  for (int64_t c = 0; c < problem.output_channels; ++c) {
    const float* source = values + (arguments.index == nullptr ? c : arguments.index[c]) * PIXELS;
    Element* target = to + c * problem.output.channel;
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      const Vec normalized = (load<Float32>(source + v * LANES) - mean[v]) * rstd[v];
      store<Format>(target + v * LANES, normalized * scale[c] + shift[c], count(v));
    }
  }
}

template <typename Format>
void forward_planes(const Problem& problem, const Forward& arguments) {
  const int64_t outputs = problem.output_channels;
  const auto body = [&](int64_t begin, int64_t end) {
    float* values = thread_scratch(problem.input_channels * PIXELS + 2 * outputs);
    float* scale = values + problem.input_channels * PIXELS;
    float* shift = scale + outputs;
    for (int64_t c = 0; c < outputs; ++c) {
      const int64_t source = arguments.index == nullptr ? c : arguments.index[c];
      scale[c] = element<Format>(arguments.weight, source);
      shift[c] = element<Format>(arguments.bias, source);
    }
    for (int64_t item = begin; item < end; ++item) {
      const Tile tile(problem, item);
      const auto run =
          tile.count == PIXELS ? forward_tile<Format, true> : forward_tile<Format, false>;
      run(problem, arguments, tile, scale, shift, values);
    }
  };
  parallel_for(tiles_of(problem), grain(PIXELS * problem.input_channels), body);
}

// All lanes, or the first `count`.
Lane first_lanes(int64_t count) { return lane_index() < (int32_t)count; }

// One pixel; weight and bias are padded to whole vectors.
template <typename Format>
void forward_pixel(int64_t channels, const typename Format::Element* from, const float* weight,
                   const float* bias, float eps, float& mean, float& rstd,
                   typename Format::Element* to) {
  const int64_t whole = channels / LANES * LANES, rest = channels - whole;
  Vec sum = {}, squares = {};
  for (int64_t c = 0; c < whole; c += LANES) sum += load<Format>(from + c);
  const Vec last = load<Format>(from + whole, rest);
  mean = sum_of_lanes(sum + last) / channels;
  for (int64_t c = 0; c < whole; c += LANES) {
    const Vec centred = load<Format>(from + c) - mean;
    squares += centred * centred;
  }
  const Vec centred = masked(last - mean, first_lanes(rest));
  rstd = 1.0f / std::sqrt(sum_of_lanes(squares + centred * centred) / channels + eps);
  for (int64_t c = 0; c < channels; c += LANES) {
    const Vec normalized = (load<Format>(from + c, channels - c) - mean) * rstd;
    store<Format>(to + c, normalized * load<Float32>(weight + c) + load<Float32>(bias + c),
                  channels - c);
  }
}

template <typename Format>
void forward_pixels(const Problem& problem, const Forward& arguments) {
  using Element = typename Format::Element;
  const int64_t channels = problem.input_channels, padded = round_up(channels, LANES);
  // Of no output channels the index is null too, and there is nothing to write.
  const bool in_place = arguments.index == nullptr && problem.output_channels > 0;
  const Moves moves(arguments.workspace, in_place ? 0 : problem.output_channels, channels,
                    arguments.index);
  const auto body = [&](int64_t begin, int64_t end) {
    // Per thread: weight | bias | rows in the input's order.
    float* weight = thread_scratch((2 + COUNT) * padded);
    float* bias = weight + padded;
    auto* rows = reinterpret_cast<Element*>(bias + padded);
    for (int64_t c = 0; c < padded; ++c) {
      weight[c] = c < channels ? element<Format>(arguments.weight, c) : 0;
      bias[c] = c < channels ? element<Format>(arguments.bias, c) : 0;
    }
    for (int64_t item = begin; item < end; ++item) {
      const Tile tile(problem, item);
      const auto* first = tile.at(static_cast<const Element*>(arguments.input), problem.input);
      auto* target = tile.at(static_cast<Element*>(arguments.output), problem.output);
      const int64_t place = place_of(problem, tile);
      const int64_t step = problem.input.column, to_step = problem.output.column;
      tile.in_steps([&](auto number, int64_t pixel) {
        constexpr int N = number();
        Element* to = target + pixel * to_step;
        for (int p = 0; p < N; ++p) {
          const int64_t at = place + pixel + p;
          Element* row = in_place ? to + p * to_step : rows + p * padded;
          forward_pixel<Format>(channels, first + (pixel + p) * step, weight, bias, problem.eps,
                                arguments.mean[at], arguments.rstd[at], row);
        }
        if (in_place) return;
        moves.apply<Format, N>(rows, padded, to, to_step);
      });
    }
  };
  parallel_for(tiles_of(problem), grain(PIXELS * channels), body);
}

int64_t parts(const Problem& problem) {
  return clamp(tiles_of(problem) / PART_TILES, 1, MOST_PARTS);
}

// Of one part, in the backward workspace: [2][input_channels], for grad_bias and grad_weight.
float* sums_of(const Problem& problem, float* workspace, int64_t part) {
  return workspace + Inverse::words(problem) + 2 * part * problem.input_channels;
}

// One tile; WHOLE: of PIXELS pixels. sums[c] and sums[input_channels + c] grow by what channel c of
// bias and weight gets, in lanes. `values` is scratch: [2][input_channels][PIXELS].
template <typename Format, bool WITH_SUMS, bool WHOLE>
void backward_tile(const Problem& problem, const Backward& arguments, const Inverse& inverse,
                   const Tile& tile, const float* weight, Vec* sums, float* values) {
  using Element = typename Format::Element;
  const auto count = [&](int64_t v) { return WHOLE ? LANES : filled(tile.count, v); };
  const int64_t channels = problem.input_channels, place = place_of(problem, tile);
  const auto* gradients =
      tile.at(static_cast<const Element*>(arguments.grad_output), problem.output);
  const auto* from = tile.at(static_cast<const Element*>(arguments.input), problem.input);
  Vec mean[VECTORS], rstd[VECTORS], total[VECTORS] = {}, along[VECTORS] = {};
  for (int v = 0; v < VECTORS; ++v) {
    mean[v] = load<Float32>(arguments.mean + place + v * LANES, count(v));
    rstd[v] = load<Float32>(arguments.rstd + place + v * LANES, count(v));
  }
  for (int64_t c = 0; c < channels; ++c) {
    Vec gradient[VECTORS] = {};
    for (int64_t r = inverse.starts[c]; r < inverse.starts[c + 1]; ++r) {
      const Element* reader = gradients + inverse.readers[r] * problem.output.channel;
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        gradient[v] += load<Format>(reader + v * LANES, count(v));
      }
    }
    Vec of_bias = {}, of_weight = {};
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      const Vec value = load<Format>(from + c * problem.input.channel + v * LANES, count(v));
      const Vec normalized = (value - mean[v]) * rstd[v];
      const Vec scaled = gradient[v] * weight[c];
      total[v] += scaled;
      along[v] += scaled * normalized;
      if (WITH_SUMS) {
        of_bias += gradient[v];
        of_weight += gradient[v] * normalized;
      }
      store<Float32>(values + c * PIXELS + v * LANES, scaled);
      store<Float32>(values + (channels + c) * PIXELS + v * LANES, normalized);
    }
    if (WITH_SUMS) {
      sums[c] += of_bias;
      sums[channels + c] += of_weight;
    }
  }
  if (arguments.grad_input == nullptr) return;
  for (int v = 0; v < VECTORS; ++v) {
    total[v] /= static_cast<float>(channels);
    along[v] /= static_cast<float>(channels);
  }
  auto* to = tile.at(static_cast<Element*>(arguments.grad_input), problem.grad_input);
  for (int64_t c = 0; c < channels; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      const Vec scaled = load<Float32>(values + c * PIXELS + v * LANES);
      const Vec normalized = load<Float32>(values + (channels + c) * PIXELS + v * LANES);
      store<Format>(to + c * problem.grad_input.channel + v * LANES,
                    (scaled - total[v] - normalized * along[v]) * rstd[v], count(v));
    }
  }
}

template <typename Format, bool WITH_SUMS>
void backward_planes(const Problem& problem, const Backward& arguments) {
  const int64_t channels = problem.input_channels, tiles = tiles_of(problem);
  const int64_t count = parts(problem);
  const Inverse inverse(problem, arguments.workspace);
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    Vec* sums = reinterpret_cast<Vec*>(thread_scratch(2 * channels * (LANES + PIXELS) + channels));
    float* values = reinterpret_cast<float*>(sums + 2 * channels);
    float* weight = values + 2 * channels * PIXELS;
    for (int64_t c = 0; c < channels; ++c) weight[c] = element<Format>(arguments.weight, c);
    for (int64_t part = begin; part < end; ++part) {
      if (WITH_SUMS) std::memset(sums, 0, 2 * channels * sizeof(Vec));
      for (int64_t item = part * tiles / count; item < (part + 1) * tiles / count; ++item) {
        const Tile tile(problem, item);
        const auto run = tile.count == PIXELS ? backward_tile<Format, WITH_SUMS, true>
                                              : backward_tile<Format, WITH_SUMS, false>;
        run(problem, arguments, inverse, tile, weight, sums, values);
      }
      float* result = sums_of(problem, arguments.workspace, part);
      for (int64_t i = 0; WITH_SUMS && i < 2 * channels; ++i) result[i] = sum_of_lanes(sums[i]);
    }
  });
}

// One pixel, whose channels' gradients are summed up; rows are padded with zeros to whole vectors.
// sums: [2][padded], of bias and weight. to: null if nobody wants it.
template <typename Format, bool WITH_SUMS>
void backward_pixel(int64_t channels, const typename Format::Element* from, const float* gradient,
                    const float* weight, float mean, float rstd, float* sums,
                    typename Format::Element* to) {
  const int64_t padded = round_up(channels, LANES);
  const auto normalized = [&](int64_t c) {
    return (load<Format>(from + c, channels - c) - mean) * rstd;
  };
  Vec total = {}, along = {};
  for (int64_t c = 0; c < padded; c += LANES) {
    const Vec own = load<Float32>(gradient + c), input = normalized(c);
    const Vec scaled = own * load<Float32>(weight + c);
    total += scaled;
    along += scaled * input;
    if (WITH_SUMS) {
      store<Float32>(sums + c, load<Float32>(sums + c) + own);
      store<Float32>(sums + padded + c, load<Float32>(sums + padded + c) + own * input);
    }
  }
  if (to == nullptr) return;
  const float mean_total = sum_of_lanes(total) / channels;
  const float mean_along = sum_of_lanes(along) / channels;
  for (int64_t c = 0; c < padded; c += LANES) {
    const Vec scaled = load<Float32>(gradient + c) * load<Float32>(weight + c);
    store<Format>(to + c, (scaled - mean_total - normalized(c) * mean_along) * rstd, channels - c);
  }
}

template <typename Format, bool WITH_SUMS>
void backward_pixels(const Problem& problem, const Backward& arguments) {
  using Element = typename Format::Element;
  const int64_t channels = problem.input_channels, padded = round_up(channels, LANES);
  const int64_t copied = minimum(channels, problem.output_channels);
  const int64_t tiles = tiles_of(problem), count = parts(problem);
  const Inverse inverse(problem, arguments.workspace);
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    // Per thread: sums | weight | gradients of COUNT pixels, by input channel | the channels whose
    // gradient is not grad_output's in their place.
    float* sums = thread_scratch((3 + COUNT) * padded + channels);
    float* weight = sums + 2 * padded;
    float* gradients = weight + padded;
    auto* added = reinterpret_cast<int32_t*>(gradients + COUNT * padded);
    int64_t added_count = 0;
    for (int64_t c = 0; c < channels; ++c) {
      if (!inverse.reads_itself_alone(c)) added[added_count++] = c;
    }
    for (int64_t c = 0; c < padded; ++c) {
      weight[c] = c < channels ? element<Format>(arguments.weight, c) : 0;
    }
    for (int64_t part = begin; part < end; ++part) {
      std::memset(sums, 0, 2 * padded * sizeof(float));
      for (int64_t item = part * tiles / count; item < (part + 1) * tiles / count; ++item) {
        const Tile tile(problem, item);
        const int64_t place = place_of(problem, tile);
        const int64_t step = problem.input.column, grad_step = problem.output.column;
        const auto* first = tile.at(static_cast<const Element*>(arguments.input), problem.input);
        const auto* first_grad =
            tile.at(static_cast<const Element*>(arguments.grad_output), problem.output);
        const bool wanted = arguments.grad_input != nullptr;
        auto* target =
            wanted ? tile.at(static_cast<Element*>(arguments.grad_input), problem.grad_input)
                   : nullptr;
        tile.in_steps([&](auto number, int64_t pixel) {
          constexpr int N = number();
          const auto* from = first + pixel * step;
          const auto* grad = first_grad + pixel * grad_step;
          for (int p = 0; p < N; ++p) {
            for (int64_t c = 0; c < padded; c += LANES) {
              store<Float32>(gradients + p * padded + c,
                             load<Format>(grad + p * grad_step + c, maximum(copied - c, 0)));
            }
          }
          for (int64_t i = 0; i < added_count; ++i) {
            const int64_t c = added[i];
            float sum[N] = {};
            for (int64_t r = inverse.starts[c]; r < inverse.starts[c + 1]; ++r) {
              const Element* reader = grad + inverse.readers[r];
              for (int p = 0; p < N; ++p) sum[p] += element<Format>(reader, p * grad_step);
            }
            for (int p = 0; p < N; ++p) gradients[p * padded + c] = sum[p];
          }
          for (int p = 0; p < N; ++p) {
            const int64_t at = place + pixel + p;
            Element* to = wanted ? target + (pixel + p) * problem.grad_input.column : nullptr;
            backward_pixel<Format, WITH_SUMS>(channels, from + p * step, gradients + p * padded,
                                              weight, arguments.mean[at], arguments.rstd[at], sums,
                                              to);
          }
        });
      }
      if (!WITH_SUMS) continue;
      float* result = sums_of(problem, arguments.workspace, part);
      std::memcpy(result, sums, channels * sizeof(float));
      std::memcpy(result + channels, sums + padded, channels * sizeof(float));
    }
  });
}

// `of_weight`: 0 for grad_bias, 1 for grad_weight.
template <typename Format>
void add_sums(const Problem& problem, float* workspace, int64_t of_weight, void* gradient) {
  if (gradient == nullptr) return;
  for (int64_t c = 0; c < problem.input_channels; c += LANES) {
    const int64_t lanes = problem.input_channels - c;
    Vec total = {};
    for (int64_t part = 0; part < parts(problem); ++part) {
      const float* sums = sums_of(problem, workspace, part) + of_weight * problem.input_channels;
      total += load<Float32>(sums + c, lanes);
    }
    store<Format>(static_cast<typename Format::Element*>(gradient) + c, total, lanes);
  }
}

}  // namespace

int64_t forward_workspace_floats(const Problem& problem) {
  return Moves::words(problem.output_channels);
}

int64_t backward_workspace_floats(const Problem& problem) {
  return Inverse::words(problem) + 2 * parts(problem) * problem.input_channels;
}

void forward(const Problem& problem, const Forward& arguments) {
  with_format(problem.dtype, [&](auto format) {
    using Format = decltype(format);
    if (!problem.channels_last) return forward_planes<Format>(problem, arguments);
    forward_pixels<Format>(problem, arguments);
  });
}

void backward(const Problem& problem, const Backward& arguments) {
  Inverse(problem, arguments.workspace).find(problem, arguments.index);
  const bool with_sums = arguments.grad_weight != nullptr || arguments.grad_bias != nullptr;
  with_format(problem.dtype, [&](auto format) {
    using Format = decltype(format);
    if (!with_sums) {
      const auto run =
          problem.channels_last ? backward_pixels<Format, false> : backward_planes<Format, false>;
      return run(problem, arguments);
    }
    const auto run =
        problem.channels_last ? backward_pixels<Format, true> : backward_planes<Format, true>;
    run(problem, arguments);
    add_sums<Format>(problem, arguments.workspace, 0, arguments.grad_bias);
    add_sums<Format>(problem, arguments.workspace, 1, arguments.grad_weight);
  });
}

}  // namespace vfmk::layer_norm_2d::cpu::VFMK_ISA
