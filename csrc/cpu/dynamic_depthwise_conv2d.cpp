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
// and grad_input), or BLOCK gradients and two sets of K sums (grad_weight). Runs of 7, 5 and 3 taps
// are compiled; other kernels are made of these (9 = 3 * 3) or of single taps.
//
// Memory, for N elements of s bytes: forward reads the input and writes the output once, 2Ns +
// BCk^2 s bytes; backward reads input and gradient and writes grad_input once, 3Ns + 2BCk^2 s. Only
// halos are read again, from cache. Work: 2k^2 N FLOP forward, 4k^2 N backward.
//
// Tiles follow from the problem alone and their sums are added in a fixed order: the result does
// not depend on the number of threads.
#include "../dynamic_depthwise_conv2d.h"

#include "../parallel.h"
#include "dynamic_depthwise_conv2d_tiles.h"
#include "vector.h"

namespace vfmk::dynamic_depthwise_conv2d::cpu::VFMK_ISA {
namespace {

// An item's kernels, one vector for each tap, in the order in which runs are walked or the reverse.
template <typename Format>
void pack_weight(const Problem& problem, const Item& item, const typename Format::Element* weight,
                 bool flip, Vec* packed, typename Format::Element* staging) {
  const int64_t taps = number_of_taps(problem);
  weight += ((problem.shared_weight ? 0 : item.batch) * problem.channels + item.channel) * taps;
  if (problem.channels_last) {
    for (int64_t c = 0; c < item.channels; ++c) {
      for (int64_t n = 0; n < taps; ++n) staging[n * LANES + c] = weight[c * taps + n];
    }
    for (int64_t n = 0; n < taps; ++n) {
      packed[flip ? taps - 1 - n : n] = load<Format>(staging + n * LANES);
    }
  } else {
    for (int64_t n = 0, j = 0; j < problem.kernel_width; ++j) {
      for (int64_t i = 0; i < problem.kernel_height; ++i, ++n) {
        const Vec value = load<Format>(weight + i * problem.kernel_width + j, 1);
        packed[flip ? taps - 1 - n : n] = Vec{} + value[0];
      }
    }
  }
}

template <typename Format>
Vec pack_bias(const Problem& problem, const Item& item, const typename Format::Element* bias) {
  if (bias == nullptr) return Vec{};
  bias += (problem.shared_bias ? 0 : item.batch * problem.channels) + item.channel;
  const Vec value = load<Format>(bias, item.channels);
  return problem.channels_last ? value : Vec{} + value[0];
}

// The runs of a kernel: K of K taps if SQUARE, where the compiler then unrolls and pipelines
// better.
bool is_square(const Taps& taps) { return taps.count.along == 1 && taps.count.across == taps.run; }

template <int K, bool SQUARE>
Pair count_runs(const Taps& taps) {
  return SQUARE ? Pair{1, K} : taps.count;
}

// to[p] = start + sum over taps n of weight[n] * source[p + n], for every vector p of the walk.
template <typename Format, int K, bool SQUARE>
void correlate_runs(const Walk& walk, Vectors<const float> source, const Taps& taps,
                    const Vec* weight, Vec start, Vectors<typename Format::Element> to) {
  const Pair runs = count_runs<K, SQUARE>(taps);
  for (int64_t a = 0; a < walk.count.along; a += BLOCK) {
    for (int64_t c = 0; c < walk.count.across; ++c) {
      Vec sums[BLOCK];
#pragma GCC unroll 16
      for (int p = 0; p < BLOCK; ++p) sums[p] = start;
      const Vec* w = weight;
      for (int64_t i = 0; i < runs.across; ++i) {
        for (int64_t j = 0; j < runs.along; ++j, w += K) {
          const float* from = source.at(a, c) + i * taps.step.across + j * taps.step.along;
#pragma GCC unroll 32
          for (int t = 0; t < BLOCK + K - 1; ++t) {
            const Vec value = in_register(load<Float32>(from + t * source.step.along));
#pragma GCC unroll 16
            for (int s = 0; s < K; ++s) {
              if (t >= s && t - s < BLOCK) sums[t - s] += w[s] * value;
            }
          }
        }
      }
      const int64_t rest = walk.count.along - a, lanes = walk.valid(c);
      if (rest >= BLOCK && lanes >= LANES) {
#pragma GCC unroll 16
        for (int p = 0; p < BLOCK; ++p) store<Format>(to.at(a + p, c), sums[p]);
      } else {
#pragma GCC unroll 1  // a rare path: unrolled, its code crowds the loop above
        for (int p = 0; p < BLOCK; ++p) {
          if (p < rest) store<Format>(to.at(a + p, c), sums[p], lanes);
        }
      }
    }
  }
}

template <typename Format>
void correlate(const Walk& walk, Vectors<const float> source, const Taps& taps, const Vec* weight,
               Vec start, Vectors<typename Format::Element> to) {
  const bool square = is_square(taps);
  const auto runs =
      taps.run == 7   ? square ? correlate_runs<Format, 7, true> : correlate_runs<Format, 7, false>
      : taps.run == 5 ? square ? correlate_runs<Format, 5, true> : correlate_runs<Format, 5, false>
      : taps.run == 3 ? square ? correlate_runs<Format, 3, true> : correlate_runs<Format, 3, false>
                      : correlate_runs<Format, 1, false>;
  runs(walk, source, taps, weight, start, to);
}

// Sums kept for each tap of a run, so that no multiply-add waits for the one before it.
template <int K>
constexpr int SETS = K == 1 ? 8 : 2;

// sums[..][s] += gradient[p] * source[p + s] for p < count and s < K, N vectors at a time, then
// N / 2 and so on. Lanes outside the mask are zeroed in both factors: an infinity in one would make
// a NaN of a zero in the other.
template <int K, int N>
inline void accumulate(Vec (&sums)[SETS<K>][K], const float* gradient, int64_t gradient_step,
                       const float* source, int64_t source_step, int64_t count, Lane mask) {
  for (; count >= N; count -= N) {
    Vec g[N];
#pragma GCC unroll 16
    for (int p = 0; p < N; ++p) g[p] = masked(load<Float32>(gradient + p * gradient_step), mask);
#pragma GCC unroll 32
    for (int t = 0; t < N + K - 1; ++t) {
      const Vec value = in_register(masked(load<Float32>(source + t * source_step), mask));
#pragma GCC unroll 16
      for (int s = 0; s < K; ++s) {
        if (t >= s && t - s < N) sums[(t - s) % SETS<K>][s] += g[t - s] * value;
      }
    }
    gradient += N * gradient_step;
    source += N * source_step;
  }
  if constexpr (N > 1) {
    accumulate<K, N / 2>(sums, gradient, gradient_step, source, source_step, count, mask);
  }
}

// totals[n] += sum of gradient[p] * source[p + n] over the vectors p of the walk, for every tap n.
// Each line of vectors is first summed by itself, as short sums lose less to rounding.
template <int K>
void correlate_gradient_runs(const Walk& walk, Vectors<const float> gradient,
                             Vectors<const float> source, const Taps& taps, Vec* totals) {
  for (int64_t c = 0; c < walk.count.across; ++c) {
    Vec* total = totals;
    for (int64_t i = 0; i < taps.count.across; ++i) {
      for (int64_t j = 0; j < taps.count.along; ++j, total += K) {
        const float* from = source.at(0, c) + i * taps.step.across + j * taps.step.along;
        Vec sums[SETS<K>][K] = {};
        accumulate<K, BLOCK>(sums, gradient.at(0, c), gradient.step.along, from, source.step.along,
                             walk.count.along, walk.mask(c));
#pragma GCC unroll 16
        for (int s = 0; s < K; ++s) {
#pragma GCC unroll 16
          for (int set = 1; set < SETS<K>; ++set) sums[0][s] += sums[set][s];
          total[s] += sums[0][s];
        }
      }
    }
  }
}

void correlate_gradient(const Walk& walk, Vectors<const float> gradient,
                        Vectors<const float> source, const Taps& taps, Vec* totals) {
  const auto runs = taps.run == 7   ? correlate_gradient_runs<7>
                    : taps.run == 5 ? correlate_gradient_runs<5>
                    : taps.run == 3 ? correlate_gradient_runs<3>
                                    : correlate_gradient_runs<1>;
  runs(walk, gradient, source, taps, totals);
}

Vec sum_gradient(const Walk& walk, Vectors<const float> gradient) {
  Vec total = {};
  for (int64_t c = 0; c < walk.count.across; ++c) {
    const Lane mask = walk.mask(c);
    Vec sums[4] = {};
    for (int64_t a = 0; a < walk.count.along; ++a) {
      sums[a % 4] += masked(load<Float32>(gradient.at(a, c)), mask);
    }
    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  return total;
}

template <typename Format>
void forward_tiles(const Problem& problem, const typename Format::Element* input,
                   const typename Format::Element* weight, const typename Format::Element* bias,
                   typename Format::Element* output) {
  const Tiles tiles(problem, problem.output_height, problem.output_width);
  const int64_t before = left_margin(problem, problem.pad_left);
  const Area area(problem, tiles.height + reach_down(problem),
                  before - problem.pad_left + tiles.width + reach_right(problem));
  const Taps taps(problem, area);
  const int64_t number = number_of_taps(problem);

  const auto body = [&](int64_t begin, int64_t end) {
    // Per thread: packed weight | staging | area.
    float* memory = thread_scratch(2 * number * LANES + area.floats());
    Vec* packed = reinterpret_cast<Vec*>(memory);
    auto* staging = reinterpret_cast<typename Format::Element*>(packed + number);
    Area x = area;
    x.data = memory + 2 * number * LANES;
    for (int64_t index = begin; index < end; ++index) {
      const Item item(problem, tiles, index);
      const Walk walk(problem, tiles, item, problem.output_height, problem.output_width);
      x.top = item.top - problem.pad_top;
      x.left = item.left - before;
      x.pack<Format>(item.plane(input, problem.input), problem.input, problem.input_height,
                     problem.input_width, item.channels);
      pack_weight<Format>(problem, item, weight, false, packed, staging);
      correlate<Format>(walk, x.at(x.top, item.left - problem.pad_left), taps, packed,
                        pack_bias<Format>(problem, item, bias),
                        item.vectors(problem, output, problem.output));
    }
  };
  parallel_for(problem.batch * tiles.per_plane() * tiles.blocks, tiles.grain(number + BLOCK), body);
}

// Partial sums of every item, one for each tap and one for the bias:
// workspace[batch][tile][sum][channel].
struct Partials {
  int64_t sums, channels, tiles;

  Partials(const Problem& problem, const Tiles& tiles)
      : sums(number_of_taps(problem) + 1),
        channels(round_up(problem.channels, LANES)),
        tiles(tiles.per_plane()) {}
  int64_t at(int64_t batch, int64_t tile, int64_t sum, int64_t channel) const {
    return ((batch * tiles + tile) * sums + sum) * channels + channel;
  }
};

Tiles backward_grid(const Problem& problem) {
  return Tiles(problem, maximum(problem.input_height, problem.output_height),
               maximum(problem.input_width, problem.output_width));
}

template <typename Format>
void backward_tiles(const Problem& problem, const Backward& arguments) {
  using Element = typename Format::Element;
  const auto* grad_output = static_cast<const Element*>(arguments.grad_output);
  const auto* input = static_cast<const Element*>(arguments.input);
  const auto* weight = static_cast<const Element*>(arguments.weight);
  auto* grad_input = static_cast<Element*>(arguments.grad_input);

  const Tiles tiles = backward_grid(problem);
  const Partials partials(problem, tiles);
  const int64_t down = reach_down(problem), right = reach_right(problem);
  const int64_t input_before = left_margin(problem, problem.pad_left);
  const Area input_area(problem, tiles.height + down,
                        input_before - problem.pad_left + tiles.width + right);
  // grad_input is a correlation with the flipped kernel, under a padding of reach - pad.
  const int64_t above = maximum(down - problem.pad_top, 0);
  const int64_t before = left_margin(problem, maximum(right - problem.pad_left, 0));
  const Area gradient_area(problem, above + tiles.height + problem.pad_top,
                           before + tiles.width + problem.pad_left);
  const Taps input_taps(problem, input_area);
  const Taps gradient_taps(problem, gradient_area);
  const int64_t number = number_of_taps(problem);
  const int64_t first_sum = arguments.grad_weight != nullptr ? 0 : number;
  const int64_t last_sum = arguments.grad_bias != nullptr ? number + 1 : number;

  const auto body = [&](int64_t begin, int64_t end) {
    // Per thread: packed weight | staging | totals | input area | gradient area.
    const int64_t vectors = 3 * number + 1;
    float* memory = thread_scratch(vectors * LANES + input_area.floats() + gradient_area.floats());
    Vec* packed = reinterpret_cast<Vec*>(memory);
    Element* staging = reinterpret_cast<Element*>(packed + number);
    Vec* totals = packed + 2 * number;
    Area x = input_area;
    x.data = memory + vectors * LANES;
    Area g = gradient_area;
    g.data = x.data + x.floats();
    for (int64_t index = begin; index < end; ++index) {
      const Item item(problem, tiles, index);
      g.top = item.top - above;
      g.left = item.left - before;
      g.pack<Format>(item.plane(grad_output, problem.output), problem.output, problem.output_height,
                     problem.output_width, item.channels);
      if (grad_input != nullptr) {
        pack_weight<Format>(problem, item, weight, true, packed, staging);
        correlate<Format>(
            Walk(problem, tiles, item, problem.input_height, problem.input_width),
            g.at(item.top + problem.pad_top - down, item.left + problem.pad_left - right),
            gradient_taps, packed, Vec{}, item.vectors(problem, grad_input, problem.grad_input));
      }
      const Walk walk(problem, tiles, item, problem.output_height, problem.output_width);
      for (int64_t n = first_sum; n < last_sum; ++n) totals[n] = Vec{};
      if (arguments.grad_weight != nullptr) {
        x.top = item.top - problem.pad_top;
        x.left = item.left - input_before;
        x.pack<Format>(item.plane(input, problem.input), problem.input, problem.input_height,
                       problem.input_width, item.channels);
        correlate_gradient(walk, g.at(item.top, item.left),
                           x.at(x.top, item.left - problem.pad_left), input_taps, totals);
      }
      if (arguments.grad_bias != nullptr) {
        totals[number] = sum_gradient(walk, g.at(item.top, item.left));
      }
      for (int64_t n = first_sum; n < last_sum; ++n) {
        float* sums = arguments.workspace + partials.at(item.batch, item.tile, n, item.channel);
        if (problem.channels_last) {
          store<Float32>(sums, totals[n]);
        } else {
          *sums = sum_of_lanes(totals[n]);
        }
      }
    }
  };
  parallel_for(problem.batch * tiles.per_plane() * tiles.blocks, tiles.grain(2 * number + BLOCK),
               body);
}

// Adds up `count` of the partial sums from number `first` on, over tiles, and over the batch where
// it shares one kernel, into a gradient of shape [batch or 1, channels, count].
template <typename Format>
void finish(const Problem& problem, const float* workspace, int64_t first, int64_t count,
            bool shared, typename Format::Element* gradient) {
  const Partials partials(problem, backward_grid(problem));
  const int64_t blocks = partials.channels / LANES;
  const int64_t summed = shared ? problem.batch : 1;
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t batch = index / blocks;
      const int64_t channel = index % blocks * LANES;
      const int64_t channels = minimum(problem.channels - channel, LANES);
      auto* to = gradient + (batch * problem.channels + channel) * count;
      for (int64_t n = 0; n < count; ++n) {
        Vec total = {};
        for (int64_t b = batch; b < batch + summed; ++b) {
          Vec sum = {};
          for (int64_t tile = 0; tile < partials.tiles; ++tile) {
            sum += load<Float32>(workspace + partials.at(b, tile, first + n, channel));
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
  const int64_t vectors = count * (summed * partials.tiles + LANES);
  parallel_for((shared ? 1 : problem.batch) * blocks, maximum(GRAIN / vectors, 1), body);
}

template <typename Format>
void backward_passes(const Problem& problem, const Backward& arguments) {
  using Element = typename Format::Element;
  const int64_t number = number_of_taps(problem);
  backward_tiles<Format>(problem, arguments);
  if (arguments.grad_weight != nullptr) {
    finish<Format>(problem, arguments.workspace, 0, number, problem.shared_weight,
                   static_cast<Element*>(arguments.grad_weight));
  }
  if (arguments.grad_bias != nullptr) {
    finish<Format>(problem, arguments.workspace, number, 1, problem.shared_bias,
                   static_cast<Element*>(arguments.grad_bias));
  }
}

}  // namespace

int64_t workspace_floats(const Problem& problem) {
  return Partials(problem, backward_grid(problem)).at(problem.batch, 0, 0, 0);
}

void forward(const Problem& problem, const void* input, const void* weight, const void* bias,
             void* output) {
  with_format(problem.dtype, [&](auto format) {
    using Format = decltype(format);
    using Element = typename Format::Element;
    forward_tiles<Format>(problem, static_cast<const Element*>(input),
                          static_cast<const Element*>(weight), static_cast<const Element*>(bias),
                          static_cast<Element*>(output));
  });
}

void backward(const Problem& problem, const Backward& arguments) {
  with_format(problem.dtype,
              [&](auto format) { backward_passes<decltype(format)>(problem, arguments); });
}

}  // namespace vfmk::dynamic_depthwise_conv2d::cpu::VFMK_ISA
