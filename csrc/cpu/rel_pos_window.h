// Windows of a grid of tokens, and the way between tensors and packed matrices of fp32: strides,
// storage format and padding end here. Used by rel_pos_attention.cpp alone.
#pragma once

#include <cstring>

#include "../rel_pos_attention.h"
#include "attention.h"

namespace vfmk::rel_pos_attention::cpu::VFMK_ISA {
namespace {

constexpr int64_t TILE_KEYS = 64;   // at most
constexpr int64_t SMALL = 1 << 15;  // floats of the keys of a window that is small
constexpr int64_t MANY = 16;        // windows

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }

  // One of `parts` ranges of whole register tiles; the last may be shorter, or empty.
  Range part(int64_t parts, int64_t index) const {
    const int64_t length = round_up(ceil_div(size(), parts), TILE_ROWS);
    return {minimum(begin + index * length, end), minimum(begin + (index + 1) * length, end)};
  }
};

// The problem, and what follows from it.
struct Plan : Problem {
  int64_t down, across, windows;  // windows in a grid, and in all grids of all heads
  int64_t queries;                // of a window, at most
  int64_t keys, padded_keys, tiles;
  int64_t padded_width;  // of a head, to whole vectors
  int64_t bias_row;  // biases of a query for each row and each column of keys, and a spare vector
  bool whole;        // a window is one work item: there are many, and they are small

  explicit Plan(const Problem& problem) : Problem(problem) {
    down = ceil_div(height, window_height);
    across = ceil_div(width, window_width);
    windows = batch * down * across * heads;
    queries = minimum(window_height, height) * minimum(window_width, width);
    keys = static_cast<int64_t>(window_height) * window_width;
    padded_keys = round_up(keys, LANES);
    tiles = ceil_div(padded_keys, TILE_KEYS);
    padded_width = round_up(head_width, LANES);
    bias_row = window_height + window_width + LANES;
    whole = windows >= MANY && padded_keys * padded_width <= SMALL;
  }
  Range tile(int64_t index) const {
    const int64_t vectors = padded_keys / LANES;
    return {index * vectors / tiles * LANES, (index + 1) * vectors / tiles * LANES};
  }
};

// A window of one sample and head: its first token, and how much of it lies in the grid.
struct Window {
  const Plan& plan;
  int64_t index, batch, head, top, left, rows, columns;

  Window(const Plan& plan, int64_t index) : plan(plan), index(index) {
    head = index % plan.heads;
    left = index / plan.heads % plan.across * plan.window_width;
    top = index / plan.heads / plan.across % plan.down * plan.window_height;
    batch = index / plan.heads / plan.across / plan.down;
    rows = minimum(plan.window_height, plan.height - top);
    columns = minimum(plan.window_width, plan.width - left);
  }
  Range queries() const { return {0, rows * columns}; }
  bool has_key(int64_t n) const {
    return n / plan.window_width < rows && n % plan.window_width < columns;
  }
};

// The tokens of a window in one tensor.
template <typename Element>
struct Tokens {
  const Window& window;
  const Strides& strides;
  Element* first;

  template <typename Pointer>
  Tokens(const Window& window, Pointer tensor, const Strides& strides)
      : window(window),
        strides(strides),
        first(tensor == nullptr ? nullptr
                                : static_cast<Element*>(tensor) + window.batch * strides.batch +
                                      window.top * strides.row + window.left * strides.column +
                                      window.head * strides.head) {}
  Element* at(int64_t row, int64_t column) const {
    return first + row * strides.row + column * strides.column;
  }
  // Queries are counted in the part of the window that lies in the grid, keys in all of it.
  Element* query(int64_t n) const { return at(n / window.columns, n % window.columns); }
  Element* key(int64_t n) const {
    return at(n / window.plan.window_width, n % window.plan.window_width);
  }
};

Strides logsumexp_strides(const Plan& plan) {
  const int64_t grid = static_cast<int64_t>(plan.height) * plan.width;
  return {plan.heads * grid, plan.width, 1, grid};
}

// to[c][n] = factor * row_of(n)[c], [head_width, count]; LANES divides count.
template <typename Format, typename RowOf>
void pack_columns(const Plan& plan, int64_t count, const RowOf& row_of, float factor, float* to) {
  for (int64_t n = 0; n < count; n += LANES) {
    const typename Format::Element* rows[LANES];
    for (int i = 0; i < LANES; ++i) rows[i] = row_of(n + i);
    for (int64_t c = 0; c < plan.head_width; c += LANES) {
      Vec square[LANES];
      const int64_t columns = minimum(plan.head_width - c, LANES);
      for (int i = 0; i < LANES; ++i) {
        square[i] = rows[i] ? load<Format>(rows[i] + c, columns) * factor : Vec{};
      }
      transpose(square);
      for (int64_t i = 0; i < columns; ++i) store<Float32>(to + (c + i) * count + n, square[i]);
    }
  }
}

// The tokens of some queries, [rows, padded_width]; zeros in rows to spare.
template <typename Format>
void pack_tokens(const Window& window, Range queries, int64_t rows, const void* tensor,
                 const Strides& strides, float* to) {
  const Tokens<const typename Format::Element> tokens(window, tensor, strides);
  const auto row_of = [&](int64_t q) {
    return q < queries.size() ? tokens.query(queries.begin + q) : nullptr;
  };
  pack_rows<Format>(row_of, rows, window.plan.head_width, 1, to, window.plan.padded_width);
}

// Biases of some queries for every row of keys, then for every column, times log2(e): [rows,
// bias_row]; zeros in rows to spare.
template <typename Format>
void pack_bias(const Window& window, Range queries, int64_t rows, const void* relative, float* to) {
  const Plan& plan = window.plan;
  const Tokens<const typename Format::Element> tokens(window, relative, plan.relative);
  const int64_t heights = plan.window_height, widths = plan.window_width;
  for (int64_t n = queries.begin; n < queries.end; ++n, to += plan.bias_row) {
    const auto* token = tokens.query(n);
    const auto* height = token + heights - 1 - n / window.columns;
    const auto* width = token + 2 * heights - 1 + widths - 1 - n % window.columns;
    for (int64_t i = 0; i < heights; i += LANES) {
      store<Float32>(to + i, load<Format>(height + i, heights - i) * LOG2E);
    }
    for (int64_t j = 0; j < widths; j += LANES) {
      store<Float32>(to + heights + j, load<Format>(width + j, widths - j) * LOG2E);
    }
  }
  std::memset(to, 0, (rows - queries.size()) * plan.bias_row * sizeof(float));
}

// `count` numbers at to[before], and zeros around them in to[0] to to[total - 1].
template <typename Format>
void write_run(const float* from, int64_t count, int64_t before, int64_t total,
               typename Format::Element* to) {
  for (int64_t n = 0; n < before; n += LANES) store<Format>(to + n, Vec{}, before - n);
  to += before;
  for (int64_t n = 0; n < count; n += LANES) {
    store<Format>(to + n, load<Float32>(from + n), count - n);
  }
  total -= before;
  for (int64_t n = count; n < total; n += LANES) store<Format>(to + n, Vec{}, total - n);
}

// Keys and values of one window. Columns are [tile][head_width][keys of the tile], and those of the
// keys come times scale * log2(e); rows are [padded_keys][padded_width]. In backward also the sums
// of their gradients over each chunk of queries, [chunk][padded_keys][padded_width].
struct Packed {
  float *key_columns, *key_rows = nullptr, *value_columns = nullptr, *value_rows = nullptr;
  float *grad_keys = nullptr, *grad_values = nullptr;
  int64_t floats;

  // For forward, without chunks, or for backward.
  Packed(const Plan& plan, int64_t chunks, float* data) {
    Memory memory{data};
    const int64_t rows = plan.padded_keys * plan.padded_width;
    key_columns = memory.take(plan.padded_keys * plan.head_width);
    if (chunks == 0) {
      value_rows = memory.take(rows);
    } else {
      key_rows = memory.take(rows);
      value_columns = memory.take(plan.padded_keys * plan.head_width);
      grad_keys = memory.take(chunks * rows);
      grad_values = memory.take(chunks * rows);
    }
    floats = memory.floats;
  }
};

// One tile of both.
template <typename Format, typename Arguments>
void pack(const Window& window, const Arguments& arguments, int64_t index, const Packed& packed) {
  using Element = const typename Format::Element;
  const Plan& plan = window.plan;
  const Range tile = plan.tile(index);
  const auto row_of = [&](const void* tensor, const Strides& strides, const void* pad) {
    const Tokens<Element> tokens(window, tensor, strides);
    return [=, &plan, &window](int64_t n) -> Element* {
      if (tile.begin + n >= plan.keys) return nullptr;
      if (window.has_key(tile.begin + n)) return tokens.key(tile.begin + n);
      return static_cast<Element*>(pad) + window.head * plan.head_width;
    };
  };
  const auto key = row_of(arguments.key, plan.key, arguments.pad_key);
  const auto value = row_of(arguments.value, plan.value, arguments.pad_value);
  const int64_t columns = tile.begin * plan.head_width, rows = tile.begin * plan.padded_width;
  pack_columns<Format>(plan, tile.size(), key, plan.scale * LOG2E, packed.key_columns + columns);
  if (packed.value_rows) {
    pack_rows<Format>(value, tile.size(), plan.head_width, 1, packed.value_rows + rows,
                      plan.padded_width);
  }
  if (packed.key_rows) {
    pack_rows<Format>(key, tile.size(), plan.head_width, 1, packed.key_rows + rows,
                      plan.padded_width);
  }
  if (packed.value_columns) {
    pack_columns<Format>(plan, tile.size(), value, 1, packed.value_columns + columns);
  }
}

}  // namespace
}  // namespace vfmk::rel_pos_attention::cpu::VFMK_ISA
