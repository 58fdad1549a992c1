// What kernels that read channels by an index share: the pixels that they work on together, the
// moves that put a row of channels in order, and the inverse of a map. Internal linkage throughout,
// as in vector.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../strides.h"
#include "integers.h"
#include "vector.h"

namespace vfmk {
namespace {

constexpr int64_t GRAIN = 1 << 15;  // elements that are worth a thread
constexpr int COUNT = 4;            // pixels that are worked on together in channels-last

inline int64_t grain(int64_t elements) { return ceil_div(GRAIN, elements + 1); }

// Up to PIXELS consecutive pixels of one sample's row.
template <int64_t PIXELS>
struct Pixels {
  int64_t sample, row, column, count;

  // Items that a sample is cut into.
  template <typename Problem>
  static int64_t chunks(const Problem& problem) {
    return problem.rows * ceil_div(problem.columns, PIXELS);
  }
  template <typename Problem>
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
  // function(count, first pixel) for COUNT pixels at a time, then for single ones.
  template <typename Function>
  void in_steps(const Function& function) const {
    int64_t pixel = 0;
    for (; pixel + COUNT <= count; pixel += COUNT) {
      function(std::integral_constant<int, COUNT>{}, pixel);
    }
    for (; pixel < count; ++pixel) function(std::integral_constant<int, 1>{}, pixel);
  }
};

// In whole vectors: a load waits for stores that are parts of it, and memory is not read before
// whole lines of it are written.
template <typename Format>
void copy(typename Format::Element* to, const typename Format::Element* from, int64_t count) {
  int64_t x = 0;
  for (; x + LANES <= count; x += LANES) {
    typename Format::Raw raw;
    std::memcpy(&raw, from + x, sizeof raw);
    std::memcpy(to + x, &raw, sizeof raw);
  }
  std::memcpy(to + x, from + x, (count - x) * sizeof *to);
}

// How a row of channels is put in order: what is copied in place, then what is moved.
struct Moves {
  int64_t copied = 0, count = 0;
  int32_t* to;    // [count]
  int32_t* from;  // [count]

  static int64_t words(int64_t channels) { return 2 * channels; }

  // Place c takes element index[c] of a row that has `available`.
  Moves(void* memory, int64_t channels, int64_t available, const int64_t* index)
      : to(static_cast<int32_t*>(memory)), from(to + channels) {
    int64_t staying = 0;
    for (int64_t c = 0; c < channels; ++c) staying += index[c] == c;
    if (2 * staying >= channels) copied = minimum(channels, available);
    for (int64_t c = 0; c < channels; ++c) {
      if (c < copied && index[c] == c) continue;
      to[count] = c;
      from[count++] = index[c];
    }
  }

  // Of N pixels' rows, `step` and `target_step` elements apart.
  template <typename Format, int N, typename Element = typename Format::Element>
  void apply(const Element* row, int64_t step, Element* target, int64_t target_step) const {
    for (int p = 0; p < N && copied > 0; ++p) {
      copy<Format>(target + p * target_step, row + p * step, copied);
    }
    for (int64_t m = 0; m < count; ++m) {
      Element values[N];
      for (int p = 0; p < N; ++p) values[p] = row[p * step + from[m]];
      for (int p = 0; p < N; ++p) target[p * target_step + to[m]] = values[p];
    }
  }
};

// A map's inverse: the readers of channel c are readers[starts[c]] ... readers[starts[c + 1] - 1],
// ascending.
struct Inverse {
  int32_t* starts;   // [input_channels + 1]
  int32_t* readers;  // [output_channels]

  template <typename Problem>
  static int64_t words(const Problem& problem) {
    return problem.input_channels + 1 + problem.output_channels;
  }
  template <typename Problem>
  Inverse(const Problem& problem, void* workspace, int64_t map = 0)
      : starts(static_cast<int32_t*>(workspace) + map * words(problem)),
        readers(starts + problem.input_channels + 1) {}

  // index null: the identity.
  template <typename Problem>
  void find(const Problem& problem, const int64_t* index) const {
    const auto source = [&](int64_t c) { return index == nullptr ? c : index[c]; };
    for (int64_t c = 0; c <= problem.input_channels; ++c) starts[c] = 0;
    for (int64_t c = 0; c < problem.output_channels; ++c) ++starts[source(c) + 1];
    for (int64_t c = 0; c < problem.input_channels; ++c) starts[c + 1] += starts[c];
    for (int64_t c = 0; c < problem.output_channels; ++c) readers[starts[source(c)]++] = c;
    for (int64_t c = problem.input_channels; c > 0; --c) starts[c] = starts[c - 1];
    starts[0] = 0;
  }
  bool reads_itself_alone(int64_t channel) const {
    return starts[channel + 1] - starts[channel] == 1 && readers[starts[channel]] == channel;
  }
};

}  // namespace
}  // namespace vfmk
