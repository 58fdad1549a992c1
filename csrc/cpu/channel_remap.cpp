// Channels in another order, scaled, on the CPU.
//
// In NCHW a vector holds LANES pixels of one channel, read in place. In channels-last forward the
// channels of COUNT pixels at a time are put in order in rows that stay in the first-level cache:
// copied as they stand if most stay in place (as when a map exchanges a few), the others element by
// element; then whole rows are scaled and written. In its backward pixels are transposed on the way
// in and out, LANES at a time, through planes that stay in the cache, where a channel's readers are
// as good as neighbours; unless most channels keep their place: then rows, as in forward.
//
// Backward gathers: each input channel adds up its readers in ascending order and is written once.
// A reader's share of grad_scale is summed at the same time, over one item, and the items' sums are
// added in a fixed order. Items follow from the problem alone: the result does not depend on the
// number of threads.
//
// Memory, for N elements of s bytes in and out: forward 2Ns; backward 2Ns, with grad_scale 3Ns.
// Large results are written past the caches, or they would first be read: Ns more.
#include "../channel_remap.h"

#include <cstring>

#include "../parallel.h"
#include "channel_map.h"

namespace vfmk::channel_remap::cpu::VFMK_ISA {
namespace {

constexpr int64_t PIXELS = 512;         // of a channels-last item
constexpr int BLOCK = 8;                // vectors of one channel between two uses of its readers
constexpr int64_t STREAMED = 16 << 20;  // bytes of a result that no cache keeps for its reader

using Item = Pixels<PIXELS>;

template <typename Format>
float element(const typename Format::Element* data, int64_t at) {
  typename Format::Raw raw = {};
  if (data == nullptr) return 1.0f;
  raw[0] = data[at];
  return Format::decode(raw)[0];
}

// A whole vector past the caches; `to` is aligned to it.
template <typename Format>
void stream(typename Format::Element* to, typename Format::Raw raw) {
#if defined(__AVX512F__)
  if constexpr (sizeof *to == 4) {
    _mm512_stream_ps(to, (__m512)raw);
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)raw);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof *to == 4) {
    _mm256_stream_ps(to, (__m256)raw);
  } else {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)raw);
  }
#else
  std::memcpy(to, &raw, sizeof raw);
#endif
}

// Where one thread writes a result of [samples, channels, rows, columns], dense.
template <typename Format>
struct Target {
  using Element = typename Format::Element;
  Element* data;  // null: nobody wants it
  bool streamed;

  Target(const Problem& problem, void* result, const Strides& strides, int64_t channels)
      : data(static_cast<Element*>(result)) {
    const int64_t elements =
        problem.maps * problem.samples * channels * problem.rows * problem.columns;
    const int64_t other = problem.channels_last ? strides.column : strides.channel;
    const auto address = reinterpret_cast<uintptr_t>(result) / sizeof(Element);
    const int64_t pitches = strides.batch | strides.row | other | static_cast<int64_t>(address);
    streamed = elements * static_cast<int64_t>(sizeof(Element)) >= STREAMED && pitches % LANES == 0;
  }
  ~Target() {
#if defined(__AVX2__)
    if (streamed) _mm_sfence();
#endif
  }
  void write(Element* to, Vec value, int64_t count = LANES) const {
    if (streamed && count >= LANES) {
      stream<Format>(to, Format::encode(value));
    } else {
      store<Format>(to, value, count);
    }
  }
  void scaled(Element* to, const Element* from, int64_t count, float factor) const {
    int64_t x = 0;
    if (streamed) {
      for (; x + LANES <= count; x += LANES) {
        stream<Format>(to + x, Format::encode(load<Format>(from + x) * factor));
      }
    } else {
      for (; x + LANES <= count; x += LANES) store<Format>(to + x, load<Format>(from + x) * factor);
    }
    store<Format>(to + x, load<Format>(from + x, count - x) * factor, count - x);
  }
  void copy(Element* to, const Element* from, int64_t count) const {
    int64_t x = 0;
    if (streamed) {
      for (; x + LANES <= count; x += LANES) {
        typename Format::Raw raw;
        std::memcpy(&raw, from + x, sizeof raw);
        stream<Format>(to + x, raw);
      }
    }
    std::memcpy(to + x, from + x, (count - x) * sizeof(Element));
  }
};

// function(sample, map, channel) for items begin ... end - 1, of which a sample has `channels`.
// Where planes are small a division for each would take as long as the plane.
template <typename Function>
void for_planes(const Problem& problem, int64_t channels, int64_t begin, int64_t end,
                const Function& function) {
  int64_t sample = begin / channels, channel = begin % channels;
  while (begin < end) {
    const int64_t map = sample / problem.samples;
    const int64_t stop = minimum(channels, channel + end - begin);
    begin += stop - channel;
    for (; channel < stop; ++channel) function(sample, map, channel);
    channel = 0;
    ++sample;
  }
}

template <typename Format>
void forward_planes(const Problem& problem, const Forward& arguments) {
  using Element = typename Format::Element;
  const auto* scale = static_cast<const Element*>(arguments.scale);
  const int64_t items = problem.maps * problem.samples * problem.output_channels;
  const auto body = [&](int64_t begin, int64_t end) {
    const Target<Format> output(problem, arguments.output, problem.output, problem.output_channels);
    const auto plane = [&](int64_t sample, int64_t map, int64_t channel) {
      const int64_t entry = map * problem.output_channels + channel;
      const auto* from = static_cast<const Element*>(arguments.input) +
                         sample * problem.input.batch +
                         arguments.index[entry] * problem.input.channel;
      auto* to = output.data + sample * problem.output.batch + channel * problem.output.channel;
      const float factor = element<Format>(scale, entry);
      for (int64_t row = 0; row < problem.rows; ++row) {
        if (scale == nullptr) {
          output.copy(to, from, problem.columns);
        } else {
          output.scaled(to, from, problem.columns, factor);
        }
        from += problem.input.row;
        to += problem.output.row;
      }
    };
    for_planes(problem, problem.output_channels, begin, end, plane);
  };
  parallel_for(items, grain(problem.rows * problem.columns), body);
}

// Elements from one pixel's row to the next: whole vectors, and one more, lest all rows of a power
// of two channels meet in the same sets of the cache.
int64_t pitch(int64_t channels) { return round_up(channels, LANES) + LANES; }

template <typename Format>
void forward_pixels(const Problem& problem, const Forward& arguments) {
  using Element = typename Format::Element;
  const int64_t channels = problem.output_channels;
  const int64_t step = pitch(channels);
  const int64_t items = problem.maps * problem.samples * Item::chunks(problem);
  const auto body = [&](int64_t begin, int64_t end) {
    const Target<Format> output(problem, arguments.output, problem.output, channels);
    // Per thread: rows in order | moves.
    float* scratch = thread_scratch(COUNT * step + Moves::words(channels));
    auto* rows = reinterpret_cast<Element*>(scratch);
    void* memory = scratch + COUNT * step;
    for (int64_t item = begin; item < end; ++item) {
      const Item pixels(problem, item);
      const int64_t map = pixels.sample / problem.samples;
      const int64_t* index = arguments.index + map * channels;
      const Moves moves(memory, channels, problem.input_channels, index);
      const auto* scale = static_cast<const Element*>(arguments.scale);
      if (scale != nullptr) scale += map * channels;
      const auto* from = pixels.at(static_cast<const Element*>(arguments.input), problem.input);
      auto* to = pixels.at(output.data, problem.output);
      pixels.in_steps([&](auto count, int64_t pixel) {
        const Element* source = from + pixel * problem.input.column;
        Element* target = to + pixel * problem.output.column;
        if (scale == nullptr && !output.streamed) {
          return moves.apply<Format, count()>(source, problem.input.column, target,
                                              problem.output.column);
        }
        moves.apply<Format, count()>(source, problem.input.column, rows, step);
        for (int p = 0; p < count(); ++p, target += problem.output.column) {
          const Element* row = rows + p * step;
          if (scale == nullptr) {
            output.copy(target, row, channels);
            continue;
          }
          for (int64_t c = 0; c < channels; c += LANES) {
            const int64_t rest = channels - c;
            output.write(target + c, load<Format>(row + c) * load<Format>(scale + c, rest), rest);
          }
        }
      });
    }
  };
  parallel_for(items, grain(PIXELS * channels), body);
}

// Sums of grad_scale: workspace[sample][part][output channel], after the inverses.
int64_t parts(const Problem& problem) { return problem.channels_last ? Item::chunks(problem) : 1; }
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
    const Target<Format> grad_input(problem, arguments.grad_input, problem.grad_input,
                                    problem.input_channels);
    Vec* sums = reinterpret_cast<Vec*>(thread_scratch(problem.output_channels * LANES));
    const auto plane = [&](int64_t sample, int64_t map, int64_t channel) {
      const Inverse inverse(problem, arguments.workspace, map);
      const int32_t* first = inverse.readers + inverse.starts[channel];
      const int32_t* last = inverse.readers + inverse.starts[channel + 1];
      const auto* gradients =
          static_cast<const Element*>(arguments.grad_output) + sample * problem.output.batch;
      const auto* own =
          static_cast<const Element*>(arguments.input) +
          (WITH_SUMS ? sample * problem.input.batch + channel * problem.input.channel : 0);
      Element* to = grad_input.data;
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
                grad_input.write(target + p * LANES, total[p]);
              }
            }
            x += BLOCK * LANES;
          } else {
            Vec total[1];
            add_readers<WITH_SUMS>(first, last, grad_output, input, factor, sums, total);
            if (target != nullptr) grad_input.write(target, total[0], rest);
            x += LANES;
          }
        }
      }
      if (WITH_SUMS) {
        for (const int32_t* r = first; r < last; ++r) {
          sums_of(problem, arguments.workspace, sample)[*r] = sum_of_lanes(sums[*r]);
        }
      }
    };
    for_planes(problem, problem.input_channels, begin, end, plane);
  };
  parallel_for(items, grain(problem.rows * problem.columns), body);
}

// LANES pixels of all channels as planes[channel]; pixels from `count` on are zeros. Fetches the
// pixels after those, whose rows lie too far apart for the processor to foresee.
template <typename Format>
void load_planes(const typename Format::Element* from, int64_t step, int64_t count,
                 int64_t channels, Vec* planes) {
  for (int64_t c = 0; c < channels; c += LANES) {
    Vec square[LANES];
#pragma GCC unroll 16
    for (int pixel = 0; pixel < LANES; ++pixel) {
      __builtin_prefetch(from + (pixel + LANES) * step + c, 0, 2);
      square[pixel] = pixel < count ? load<Format>(from + pixel * step + c, channels - c) : Vec{};
    }
    transpose(square);
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; ++lane) planes[c + lane] = square[lane];
  }
}

template <typename Format>
void store_planes(const Target<Format>& target, typename Format::Element* to, int64_t step,
                  int64_t count, int64_t channels, const Vec* planes) {
  for (int64_t c = 0; c < channels; c += LANES) {
    Vec square[LANES];
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; ++lane) square[lane] = planes[c + lane];
    transpose(square);
#pragma GCC unroll 16
    for (int pixel = 0; pixel < LANES; ++pixel) {
      if (pixel < count) target.write(to + pixel * step + c, square[pixel], channels - c);
    }
  }
}

// One channels-last item of backward, and what its thread works in.
template <typename Format>
struct BackwardItem {
  using Element = typename Format::Element;
  const Problem& problem;
  Inverse inverse;
  const int64_t* index;          // of its map
  const float* factors;          // [output_channels], of its map
  int64_t pixels;                // of the item
  const Element* grad_output;    // of its first pixel, as the next two
  const Element* input;          // null: no sums for grad_scale
  Element* grad_input;           // null: nobody wants it
  const Target<Format>& target;  // that writes it
  Vec* sums;                     // for grad_scale, zeros: [output_channels]

  // LANES pixels at a time, through planes of the channels.
  template <bool WITH_SUMS>
  void transposed(Vec* scratch) const {
    Vec* gradients = scratch;
    Vec* planes = scratch + round_up(problem.output_channels, LANES);
    for (int64_t pixel = 0; pixel < pixels; pixel += LANES) {
      const int64_t count = minimum(pixels - pixel, LANES);
      load_planes<Format>(grad_output + pixel * problem.output.column, problem.output.column, count,
                          problem.output_channels, gradients);
      if (WITH_SUMS) {
        load_planes<Format>(input + pixel * problem.input.column, problem.input.column, count,
                            problem.input_channels, planes);
        for (int64_t c = 0; c < problem.output_channels; c += LANES) {
          Vec products[LANES];
#pragma GCC unroll 16
          for (int lane = 0; lane < LANES; ++lane) {
            const int64_t last = problem.output_channels - 1;
            products[lane] = gradients[c + lane] * planes[index[minimum(c + lane, last)]];
          }
          sums[c / LANES] += combine_lanes(products, [](Vec a, Vec b) { return a + b; });
        }
      }
      if (grad_input == nullptr) continue;
      for (int64_t c = 0; c < problem.input_channels; ++c) {
        Vec total = {};
        for (int32_t r = inverse.starts[c]; r < inverse.starts[c + 1]; ++r) {
          total += factors[inverse.readers[r]] * gradients[inverse.readers[r]];
        }
        planes[c] = total;
      }
      store_planes<Format>(target, grad_input + pixel * problem.grad_input.column,
                           problem.grad_input.column, count, problem.input_channels, planes);
    }
  }

  // What is not as in the identity: input channels that more or others read than the output of the
  // same number, their readers, and output channels that read another.
  struct Changes {
    int64_t channel_count = 0, reader_count = 0, move_count = 0;
    int32_t* channels;  // [input_channels]
    int32_t* moves;     // [output_channels]
  };
  Changes changes(int32_t* memory) const {
    Changes found;
    found.channels = memory;
    found.moves = memory + problem.input_channels;
    for (int64_t c = 0; c < problem.input_channels; ++c) {
      if (inverse.reads_itself_alone(c)) continue;
      found.channels[found.channel_count++] = c;
      found.reader_count += inverse.starts[c + 1] - inverse.starts[c];
    }
    for (int64_t c = 0; c < problem.output_channels; ++c) {
      if (index[c] != c) found.moves[found.move_count++] = c;
    }
    return found;
  }

  // Pixel by pixel: the row as it stands, then the channels that changed. The products of those in
  // the wrong place are dropped at the end for their own.
  template <bool WITH_SUMS>
  void in_rows(const Changes& changes, Vec* scratch) const {
    const int64_t outputs = problem.output_channels;
    const int64_t staying = minimum(problem.input_channels, outputs);
    float* row = reinterpret_cast<float*>(scratch);                          // [input_channels]
    Vec* block = scratch + round_up(problem.input_channels, LANES) / LANES;  // [output_channels]
    float* block_moves = reinterpret_cast<float*>(block + round_up(outputs, LANES) / LANES);
    float* move_sums = block_moves + outputs;
    for (int64_t m = 0; m < changes.move_count; ++m) move_sums[m] = 0;
    for (int64_t first = 0; first < pixels; first += LANES) {  // long sums round more
      for (int64_t c = 0; c < staying; c += LANES) block[c / LANES] = Vec{};
      for (int64_t m = 0; m < changes.move_count; ++m) block_moves[m] = 0;
      for (int64_t pixel = first; pixel < minimum(first + LANES, pixels); ++pixel) {
        const Element* gradient = grad_output + pixel * problem.output.column;
        if (WITH_SUMS) {
          const Element* own = input + pixel * problem.input.column;
          for (int64_t c = 0; c < staying; c += LANES) {
            block[c / LANES] +=
                load<Format>(gradient + c, staying - c) * load<Format>(own + c, staying - c);
          }
          for (int64_t m = 0; m < changes.move_count; ++m) {
            const int32_t to = changes.moves[m];
            block_moves[m] += element<Format>(gradient, to) * element<Format>(own, index[to]);
          }
        }
        if (grad_input == nullptr) continue;
        for (int64_t c = 0; c < staying; c += LANES) {
          store<Float32>(row + c, load<Format>(gradient + c, staying - c) *
                                      load<Float32>(factors + c, staying - c));
        }
        for (int64_t n = 0; n < changes.channel_count; ++n) {
          const int32_t channel = changes.channels[n];
          float total = 0;
          for (int32_t r = inverse.starts[channel]; r < inverse.starts[channel + 1]; ++r) {
            total += factors[inverse.readers[r]] * element<Format>(gradient, inverse.readers[r]);
          }
          row[channel] = total;
        }
        Element* to = grad_input + pixel * problem.grad_input.column;
        for (int64_t c = 0; c < problem.input_channels; c += LANES) {
          target.write(to + c, load<Float32>(row + c), problem.input_channels - c);
        }
      }
      if (!WITH_SUMS) continue;
      for (int64_t c = 0; c < staying; c += LANES) sums[c / LANES] += block[c / LANES];
      for (int64_t m = 0; m < changes.move_count; ++m) move_sums[m] += block_moves[m];
    }
    float* sum = reinterpret_cast<float*>(sums);
    for (int64_t m = 0; m < changes.move_count; ++m) sum[changes.moves[m]] = move_sums[m];
  }
};

template <typename Format, bool WITH_SUMS>
void backward_pixels(const Problem& problem, const Backward& arguments) {
  using Element = typename Format::Element;
  const auto* scale = static_cast<const Element*>(arguments.scale);
  const int64_t inputs = round_up(problem.input_channels, LANES);
  const int64_t outputs = round_up(problem.output_channels, LANES);
  const auto body = [&](int64_t begin, int64_t end) {
    const Target<Format> target(problem, arguments.grad_input, problem.grad_input,
                                problem.input_channels);
    // Per thread: sums | scale | what changes | what an item works in.
    float* scratch = thread_scratch(3 * outputs + inputs + (outputs + inputs) * LANES);
    Vec* sums = reinterpret_cast<Vec*>(scratch);
    float* factors = scratch + outputs;
    auto* memory = reinterpret_cast<int32_t*>(factors + outputs);
    Vec* work = reinterpret_cast<Vec*>(memory + inputs + outputs);
    for (int64_t at = begin; at < end; ++at) {
      const Item pixels(problem, at);
      const int64_t map = pixels.sample / problem.samples;
      for (int64_t c = 0; c < problem.output_channels; ++c) {
        factors[c] = element<Format>(scale, map * problem.output_channels + c);
      }
      for (int64_t c = 0; c < outputs; c += LANES) sums[c / LANES] = Vec{};
      const BackwardItem<Format> item{
          problem,
          Inverse(problem, arguments.workspace, map),
          arguments.index + map * problem.output_channels,
          factors,
          pixels.count,
          pixels.at(static_cast<const Element*>(arguments.grad_output), problem.output),
          WITH_SUMS ? pixels.at(static_cast<const Element*>(arguments.input), problem.input)
                    : nullptr,
          target.data == nullptr ? nullptr : pixels.at(target.data, problem.grad_input),
          target,
          sums};
      const auto changes = item.changes(memory);
      if (4 * (changes.channel_count + changes.reader_count + changes.move_count) >
          problem.input_channels + problem.output_channels) {
        item.template transposed<WITH_SUMS>(work);
      } else {
        item.template in_rows<WITH_SUMS>(changes, work);
      }
      if (WITH_SUMS) {
        std::memcpy(sums_of(problem, arguments.workspace, at), sums,
                    problem.output_channels * sizeof(float));
      }
    }
  };
  parallel_for(problem.maps * problem.samples * Item::chunks(problem),
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

}  // namespace

int64_t workspace_words(const Problem& problem) {
  return problem.maps * Inverse::words(problem) +
         problem.maps * problem.samples * parts(problem) * problem.output_channels;
}

void forward(const Problem& problem, const Forward& arguments) {
  with_format(problem.dtype, [&](auto format) {
    using Format = decltype(format);
    if (!problem.channels_last) return forward_planes<Format>(problem, arguments);
    forward_pixels<Format>(problem, arguments);
  });
}

void backward(const Problem& problem, const Backward& arguments) {
  for (int64_t map = 0; map < problem.maps; ++map) {
    Inverse(problem, arguments.workspace, map)
        .find(problem, arguments.index + map * problem.output_channels);
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
