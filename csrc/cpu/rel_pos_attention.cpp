// Attention in windows with decomposed relative position, on the CPU.
//
// The keys and values of a window (global attention: of the grid) of one head are packed once, as
// rows and as columns. Then blocks of queries, QUERIES at most, walk over tiles of keys, TILE_KEYS
// at most:
//
//   both       scores = biases + queries * keys^T, in units of log2(e)
//   forward    weights = exp2(scores - maximum so far)
//              sums = exp2(old maximum - new maximum) * sums + weights * values
//   backward   weights = exp2(scores - logsumexp)
//              grad_scores = weights * (grad_outputs * values^T - delta)
//              grad_queries += grad_scores * keys
//              grad_keys += grad_scores^T * queries
//              grad_values += weights^T * grad_outputs
//
// Each product is a run of register tiles (matrix.h). Its right factor, 16 KiB at head width 64,
// stays in the first cache, and the scores of a block and tile, 30 KiB, never leave the second. A
// tile of keys is made of runs that lie in one row of the window: the biases of a query and a run
// are one number and a piece of one vector, and their gradients one sum and one addition.
//
// Work items are windows where those are many and small. Else they are blocks of queries in
// forward, and chunks of queries in backward, each with sums of its own for the keys; these are
// added up in order. All this follows from the problem alone, not from the number of threads.
//
// N queries with M keys each, head width d, rows + columns biases each, s bytes an element: forward
// is 4NMd FLOP, reads (3d + rows + columns)Ns bytes and writes dNs; backward is 10NMd FLOP, reads
// (5d + rows + columns)Ns and writes (3d + 2 rows + 2 columns)Ns. The floor is the rate of the
// multiply-add units. NM exponentials, biases and their gradients add a sixth to it; windows of
// 14x14 also wait for memory, as M/s FLOP per byte are few.
#include "../rel_pos_attention.h"

#include <cfloat>
#include <cmath>

#include "../parallel.h"
#include "rel_pos_window.h"

namespace vfmk::rel_pos_attention::cpu::VFMK_ISA {
namespace {

constexpr int64_t QUERIES = 96;             // of a block, at most; TILE_ROWS and LANES divide it
constexpr int64_t ROW = TILE_KEYS + LANES;  // of scores: runs are written in whole vectors
constexpr int64_t CHUNK = 192;              // queries, at least
constexpr int64_t CHUNKS = 8;               // of a window, at most
constexpr int64_t FORWARD_TASKS = 64;       // of one parallel loop over windows that are not small
constexpr int64_t BACKWARD_TASKS = 16;      // fewer, as each has gradients of all keys of its own

// Some queries of a window, `rows` with the zeros that fill the last register tile, and what is
// known of them. First dimension: the query.
struct Block {
  Range queries;
  int64_t rows;
  float *query, *bias, *scores;  // [padded_width], [bias_row], [ROW]
  float* sums;                   // [padded_width], of the output or of grad_query
  float *top, *total, *factor;   // the largest score yet; sums of weights, [LANES]; see soften
  float *grad_output, *grad_scores, *logsumexp, *delta;
  float *grad_heights, *grad_widths;  // [window_height][QUERIES], the query last; [bias_row]
  float* line;                        // [bias_row], of one query
  int64_t floats;

  Block(const Plan& plan, float* data) {
    Memory memory{data};
    query = memory.take(QUERIES * plan.padded_width);
    bias = memory.take(QUERIES * plan.bias_row);
    scores = memory.take(QUERIES * ROW);
    sums = memory.take(QUERIES * plan.padded_width);
    top = memory.take(QUERIES);
    total = memory.take(QUERIES * LANES);
    factor = memory.take(QUERIES);
    grad_output = memory.take(QUERIES * plan.padded_width);
    grad_scores = memory.take(QUERIES * ROW);
    logsumexp = memory.take(QUERIES);
    delta = memory.take(QUERIES);
    grad_heights = memory.take(QUERIES * plan.window_height);
    grad_widths = memory.take(QUERIES * plan.bias_row);
    line = memory.take(plan.bias_row);
    floats = memory.floats;
  }
};

// work(block) for blocks of a range of queries, one after the other.
template <typename Work>
void for_each_block(const Plan& plan, Range queries, float* memory, const Work& work) {
  Block block(plan, memory);
  const int64_t blocks = ceil_div(queries.size(), QUERIES);
  for (int64_t i = 0; i < blocks; ++i) {
    block.queries = queries.part(blocks, i);
    block.rows = round_up(block.queries.size(), TILE_ROWS);
    if (block.rows > 0) work(block);
  }
}

// visit(row, column, at, count): `count` keys, from number `at` of the tile on, lie in one row of
// the window, from `column` on.
template <typename Visit>
inline void for_each_run(const Plan& plan, Range tile, const Visit& visit) {
  const int64_t end = minimum(tile.end, plan.keys);
  int64_t row = tile.begin / plan.window_width, column = tile.begin % plan.window_width;
  for (int64_t n = tile.begin; n < end; ++row, column = 0) {
    const int64_t count = minimum(plan.window_width - column, end - n);
    visit(row, column, n - tile.begin, count);
    n += count;
  }
}

// block.scores, in units of log2(e). Keys that fill the last tile score -infinity.
void score(const Plan& plan, Range tile, const Packed& packed, const Block& block) {
  for (int64_t q = 0; q < block.rows; ++q) {
    const float* heights = block.bias + q * plan.bias_row;
    const float* widths = heights + plan.window_height;
    float* scores = block.scores + q * ROW;
    for_each_run(plan, tile, [&](int64_t row, int64_t column, int64_t at, int64_t count) {
      for (int64_t n = 0; n < count; n += LANES) {
        store<Float32>(scores + at + n, load<Float32>(widths + column + n) + heights[row]);
      }
    });
    if (tile.end > plan.keys) {
      store<Float32>(scores + plan.keys - tile.begin, broadcast(-INFINITY));
    }
  }
  multiply<Start::sum>(
      block.rows, tile.size() / LANES, plan.head_width, {block.query, plan.padded_width, 1},
      {packed.key_columns + tile.begin * plan.head_width, tile.size()}, block.scores, ROW);
}

// Scores become weights exp2(score - top) under new tops. What query q has summed up under its old
// one is to be multiplied by factor[q].
void soften(const Block& block, int64_t keys) {
  for (int64_t q = 0; q < block.rows; q += LANES) {
    Vec highest[LANES];
    for (int i = 0; i < LANES; ++i) {
      const float* scores = block.scores + (q + i) * ROW;
      highest[i] = load<Float32>(scores);
      for (int64_t n = LANES; n < keys; n += LANES) {
        highest[i] = maximum(highest[i], load<Float32>(scores + n));
      }
    }
    const Vec old_top = load<Float32>(block.top + q);
    const Vec new_top =
        maximum(combine_lanes(highest, [](Vec a, Vec b) { return maximum(a, b); }), old_top);
    store<Float32>(block.top + q, new_top);
    store<Float32>(block.factor + q, exp2(old_top - new_top));
  }
  for (int64_t q = 0; q < block.rows; ++q) {
    float* scores = block.scores + q * ROW;
    float* total = block.total + q * LANES;
    Vec sum = load<Float32>(total) * block.factor[q];
    for (int64_t n = 0; n < keys; n += LANES) {
      const Vec weight = exp2(load<Float32>(scores + n) - block.top[q]);
      store<Float32>(scores + n, weight);
      sum += weight;
    }
    store<Float32>(total, sum);
  }
}

template <typename Format>
void attend(const Window& window, const Forward& arguments, const Packed& packed,
            const Block& block) {
  const Plan& plan = window.plan;
  pack_tokens<Format>(window, block.queries, block.rows, arguments.query, plan.query, block.query);
  pack_bias<Format>(window, block.queries, block.rows, arguments.relative, block.bias);
  std::memset(block.sums, 0, block.rows * plan.padded_width * sizeof(float));
  std::memset(block.total, 0, block.rows * LANES * sizeof(float));
  for (int64_t q = 0; q < block.rows; ++q) block.top[q] = -FLT_MAX;
  for (int64_t t = 0; t < plan.tiles; ++t) {
    const Range tile = plan.tile(t);
    score(plan, tile, packed, block);
    soften(block, tile.size());
    multiply<Start::scaled_sum>(
        block.rows, plan.padded_width / LANES, tile.size(), {block.scores, ROW, 1},
        {packed.value_rows + tile.begin * plan.padded_width, plan.padded_width}, block.sums,
        plan.padded_width, block.factor);
  }
  const Tokens<typename Format::Element> output(window, arguments.output, plan.output);
  const Strides strides = logsumexp_strides(plan);
  const Tokens<float> logsumexp(window, arguments.logsumexp, strides);
  for (int64_t q = 0; q < block.queries.size(); ++q) {
    const int64_t n = block.queries.begin + q;
    const float total = sum_of_lanes(load<Float32>(block.total + q * LANES));
    write_row<Format>(block.sums + q * plan.padded_width, plan.head_width, 1 / total,
                      output.query(n));
    *logsumexp.query(n) = block.top[q] * LN2 + std::log(total);
  }
}

struct Wanted {
  bool query, key, value, relative;

  explicit Wanted(const Backward& arguments)
      : query(arguments.grad_query),
        key(arguments.grad_key || arguments.grad_pad_key),
        value(arguments.grad_value || arguments.grad_pad_value),
        relative(arguments.grad_relative) {}
};

// block.logsumexp, times log2(e), and block.delta, the products <grad_output, output>.
template <typename Format>
void pack_statistics(const Window& window, const Backward& arguments, const Block& block) {
  const Plan& plan = window.plan;
  const Tokens<const typename Format::Element> output(window, arguments.output, plan.output);
  const Strides strides = logsumexp_strides(plan);
  const Tokens<const float> logsumexp(window, arguments.logsumexp, strides);
  for (int64_t q = 0; q < block.rows; ++q) {
    block.delta[q] = block.logsumexp[q] = 0;
    if (q >= block.queries.size()) continue;
    const auto* row = output.query(block.queries.begin + q);
    Vec delta = {};
    for (int64_t c = 0; c < plan.head_width; c += LANES) {
      delta += load<Format>(row + c, plan.head_width - c) *
               load<Float32>(block.grad_output + q * plan.padded_width + c);
    }
    block.delta[q] = sum_of_lanes(delta);
    block.logsumexp[q] = *logsumexp.query(block.queries.begin + q) * LOG2E;
  }
}

// Scores become weights, and gradients of weights those of scores.
void differentiate_softmax(const Block& block, int64_t keys) {
  for (int64_t q = 0; q < block.rows; ++q) {
    float* scores = block.scores + q * ROW;
    float* gradients = block.grad_scores + q * ROW;
    for (int64_t n = 0; n < keys; n += LANES) {
      const Vec weight = exp2(load<Float32>(scores + n) - block.logsumexp[q]);
      const Vec gradient = weight * (load<Float32>(gradients + n) - block.delta[q]);
      store<Float32>(scores + n, weight);
      store<Float32>(gradients + n, gradient);
    }
  }
}

// Adds the gradients of a tile's scores up over each row and each column of keys.
void sum_bias(const Plan& plan, Range tile, const Block& block) {
  for_each_run(plan, tile, [&](int64_t row, int64_t column, int64_t at, int64_t count) {
    for (int64_t first = 0; first < block.rows; first += LANES) {
      Vec sums[LANES] = {};
      for (int64_t q = first; q < minimum(first + LANES, block.rows); ++q) {
        const float* from = block.grad_scores + q * ROW + at;
        float* to = block.grad_widths + q * plan.bias_row + column;
        for (int64_t n = 0; n < count; n += LANES) {
          const Vec gradient =
              masked(load<Float32>(from + n), lane_index() < static_cast<int32_t>(count - n));
          store<Float32>(to + n, load<Float32>(to + n) + gradient);
          sums[q - first] += gradient;
        }
      }
      float* to = block.grad_heights + row * QUERIES + first;
      const Vec sum = combine_lanes(sums, [](Vec a, Vec b) { return a + b; });
      store<Float32>(to, load<Float32>(to) + sum);
    }
  });
}

template <typename Format>
void write_query_gradients(const Window& window, const Backward& arguments, const Block& block) {
  using Element = typename Format::Element;
  const Plan& plan = window.plan;
  const Tokens<Element> grad_query(window, arguments.grad_query, plan.grad_query);
  const Tokens<Element> grad_relative(window, arguments.grad_relative, plan.grad_relative);
  const int64_t heights = plan.window_height, widths = plan.window_width;
  for (int64_t q = 0; q < block.queries.size(); ++q) {
    const int64_t n = block.queries.begin + q;
    if (arguments.grad_query) {
      write_row<Format>(block.sums + q * plan.padded_width, plan.head_width, plan.scale,
                        grad_query.query(n));
    }
    if (arguments.grad_relative) {
      Element* to = grad_relative.query(n);
      for (int64_t i = 0; i < heights; ++i) block.line[i] = block.grad_heights[i * QUERIES + q];
      write_run<Format>(block.line, heights, heights - 1 - n / window.columns, 2 * heights - 1, to);
      write_run<Format>(block.grad_widths + q * plan.bias_row, widths,
                        widths - 1 - n % window.columns, 2 * widths - 1, to + 2 * heights - 1);
    }
  }
}

// The gradients of a block's queries, and what they add to those of keys and values. These start
// at zero with the first block.
template <typename Format>
void differentiate(const Window& window, const Backward& arguments, const Packed& packed,
                   const Block& block, float* grad_keys, float* grad_values, bool first) {
  const Plan& plan = window.plan;
  const Wanted wanted(arguments);
  const int64_t width = plan.padded_width, vectors = width / LANES;
  const auto add_keys = first ? multiply<Start::zero> : multiply<Start::sum>;
  pack_tokens<Format>(window, block.queries, block.rows, arguments.query, plan.query, block.query);
  pack_tokens<Format>(window, block.queries, block.rows, arguments.grad_output, plan.grad_output,
                      block.grad_output);
  pack_bias<Format>(window, block.queries, block.rows, arguments.relative, block.bias);
  pack_statistics<Format>(window, arguments, block);
  std::memset(block.sums, 0, block.rows * width * sizeof(float));
  std::memset(block.grad_heights, 0, plan.window_height * QUERIES * sizeof(float));
  std::memset(block.grad_widths, 0, block.rows * plan.bias_row * sizeof(float));
  for (int64_t t = 0; t < plan.tiles; ++t) {
    const Range tile = plan.tile(t);
    const int64_t rows = tile.begin * width;
    score(plan, tile, packed, block);
    if (wanted.query || wanted.key || wanted.relative) {
      multiply<Start::zero>(block.rows, tile.size() / LANES, plan.head_width,
                            {block.grad_output, width, 1},
                            {packed.value_columns + tile.begin * plan.head_width, tile.size()},
                            block.grad_scores, ROW);
    }
    differentiate_softmax(block, tile.size());
    if (wanted.relative) sum_bias(plan, tile, block);
    if (wanted.query) {
      multiply<Start::sum>(block.rows, vectors, tile.size(), {block.grad_scores, ROW, 1},
                           {packed.key_rows + rows, width}, block.sums, width);
    }
    if (wanted.key) {
      add_keys(tile.size(), vectors, block.rows, {block.grad_scores, 1, ROW}, {block.query, width},
               grad_keys + rows, width, nullptr);
    }
    if (wanted.value) {
      add_keys(tile.size(), vectors, block.rows, {block.scores, 1, ROW}, {block.grad_output, width},
               grad_values + rows, width, nullptr);
    }
  }
  write_query_gradients<Format>(window, arguments, block);
}

// Adds up the chunks' gradients of a tile's keys, or values, and writes them. Those beyond the
// grid go to pad_sum, [padded_width].
template <typename Format>
void write_key_gradients(const Window& window, Range tile, const float* sums, int64_t chunks,
                         float factor, void* gradient, const Strides& strides, float* pad_sum) {
  const Plan& plan = window.plan;
  const Tokens<typename Format::Element> tokens(window, gradient, strides);
  const int64_t chunk = plan.padded_keys * plan.padded_width;
  if (pad_sum) std::memset(pad_sum, 0, plan.padded_width * sizeof(float));
  for (int64_t n = tile.begin; n < minimum(tile.end, plan.keys); ++n) {
    const bool inside = window.has_key(n);
    auto* to = inside && gradient ? tokens.key(n) : nullptr;
    for (int64_t c = 0; c < plan.padded_width; c += LANES) {
      const float* from = sums + n * plan.padded_width + c;
      Vec sum = load<Float32>(from);
      for (int64_t i = 1; i < chunks; ++i) sum += load<Float32>(from + i * chunk);
      sum *= factor;
      if (to) store<Format>(to + c, sum, plan.head_width - c);
      if (!inside) store<Float32>(pad_sum + c, load<Float32>(pad_sum + c) + sum);
    }
  }
}

// Adds up pad_sums[window][tile][key or value][padded_width] over samples, windows and tiles.
template <typename Format>
void write_pad_gradient(const Plan& plan, const float* pad_sums, int64_t key_or_value,
                        void* gradient) {
  for (int64_t head = 0; gradient && head < plan.heads; ++head) {
    auto* to = static_cast<typename Format::Element*>(gradient) + head * plan.head_width;
    for (int64_t c = 0; c < plan.head_width; c += LANES) {
      Vec sum = {};
      for (int64_t window = head; window < plan.windows; window += plan.heads) {
        for (int64_t t = 0; t < plan.tiles; ++t) {
          const int64_t row = (window * plan.tiles + t) * 2 + key_or_value;
          sum += load<Float32>(pad_sums + row * plan.padded_width + c);
        }
      }
      store<Format>(to + c, sum, plan.head_width - c);
    }
  }
}

// How the windows are shared out. A window that is not whole has its queries split into `parts`,
// and `group` windows are worked on at once.
struct Schedule {
  int64_t chunks;  // with gradients of keys of their own: the parts in backward, none in forward
  int64_t parts, group;
  int64_t grain;                // parts
  int64_t packed, block;        // floats of one window, of one block
  int64_t pad_sums, workspace;  // floats

  Schedule(const Plan& plan, bool backward) {
    const int64_t blocks = maximum(ceil_div(plan.queries, QUERIES), 1);
    const int64_t most = plan.whole ? 1 : CHUNKS;
    parts = backward ? clamp(plan.queries / CHUNK, 1, most) : blocks;
    chunks = backward ? parts : 0;
    group = clamp((backward ? BACKWARD_TASKS : FORWARD_TASKS) / parts, 1, plan.windows);
    const int64_t work = plan.queries * plan.padded_keys * plan.head_width / (parts * LANES);
    grain = maximum(GRAIN / ((backward ? 5 : 2) * work + 1), 1);
    packed = Packed(plan, chunks, nullptr).floats;
    block = Block(plan, nullptr).floats;
    pad_sums = backward && plan.has_padding ? 2 * plan.windows * plan.tiles * plan.padded_width : 0;
    workspace = pad_sums + (plan.whole ? 0 : group * packed);
  }
};

// For each window pack(window, tile, packed), then work(window, part, packed, memory of a block),
// then finish(window, tile, packed).
template <typename Pack, typename Work, typename Finish>
void for_each_window(const Plan& plan, const Schedule& schedule, float* workspace, const Pack& pack,
                     const Work& work, const Finish& finish) {
  if (plan.whole) {
    const int64_t grain = maximum(schedule.grain / schedule.parts, 1);
    return parallel_for(plan.windows, grain, [&](int64_t begin, int64_t end) {
      float* memory = thread_scratch(schedule.packed + schedule.block);
      const Packed packed(plan, schedule.chunks, memory);
      for (int64_t index = begin; index < end; ++index) {
        const Window window(plan, index);
        for (int64_t t = 0; t < plan.tiles; ++t) pack(window, t, packed);
        for (int64_t i = 0; i < schedule.parts; ++i) {
          work(window, i, packed, memory + schedule.packed);
        }
        for (int64_t t = 0; t < plan.tiles; ++t) finish(window, t, packed);
      }
    });
  }
  for (int64_t first = 0; first < plan.windows; first += schedule.group) {
    const int64_t windows = minimum(schedule.group, plan.windows - first);
    const auto loop = [&](int64_t parts, int64_t grain, const auto& body) {
      parallel_for(windows * parts, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Packed packed(plan, schedule.chunks, workspace + i / parts * schedule.packed);
          body(Window(plan, first + i / parts), i % parts, packed);
        }
      });
    };
    const int64_t tile_grain = maximum(GRAIN / (TILE_KEYS * plan.padded_width), 1);
    loop(plan.tiles, tile_grain, pack);
    loop(schedule.parts, schedule.grain,
         [&](const Window& window, int64_t part, const Packed& packed) {
           work(window, part, packed, thread_scratch(schedule.block));
         });
    loop(plan.tiles, tile_grain, finish);
  }
}

template <typename Format>
void forward(const Plan& plan, const Forward& arguments) {
  const Schedule schedule(plan, false);
  for_each_window(
      plan, schedule, arguments.workspace,
      [&](const Window& window, int64_t tile, const Packed& packed) {
        pack<Format>(window, arguments, tile, packed);
      },
      [&](const Window& window, int64_t part, const Packed& packed, float* memory) {
        for_each_block(
            plan, window.queries().part(schedule.parts, part), memory,
            [&](const Block& block) { attend<Format>(window, arguments, packed, block); });
      },
      [](const Window&, int64_t, const Packed&) {});
}

template <typename Format>
void backward(const Plan& plan, const Backward& arguments) {
  const Schedule schedule(plan, true);
  const Wanted wanted(arguments);
  const int64_t chunk_floats = plan.padded_keys * plan.padded_width;
  float* pad_sums = arguments.workspace;
  for_each_window(
      plan, schedule, arguments.workspace + schedule.pad_sums,
      [&](const Window& window, int64_t tile, const Packed& packed) {
        pack<Format>(window, arguments, tile, packed);
      },
      [&](const Window& window, int64_t chunk, const Packed& packed, float* memory) {
        const Range queries = window.queries().part(schedule.chunks, chunk);
        float* grad_keys = packed.grad_keys + chunk * chunk_floats;
        float* grad_values = packed.grad_values + chunk * chunk_floats;
        for_each_block(plan, queries, memory, [&](const Block& block) {
          differentiate<Format>(window, arguments, packed, block, grad_keys, grad_values,
                                block.queries.begin == queries.begin);
        });
      },
      [&](const Window& window, int64_t tile, const Packed& packed) {
        int64_t chunks = schedule.chunks;
        while (window.queries().part(schedule.chunks, chunks - 1).size() == 0) --chunks;
        const auto sum = [&](int64_t key_or_value) {
          const int64_t row = (window.index * plan.tiles + tile) * 2 + key_or_value;
          return plan.has_padding ? pad_sums + row * plan.padded_width : nullptr;
        };
        if (wanted.key) {
          write_key_gradients<Format>(window, plan.tile(tile), packed.grad_keys, chunks, plan.scale,
                                      arguments.grad_key, plan.grad_key, sum(0));
        }
        if (wanted.value) {
          write_key_gradients<Format>(window, plan.tile(tile), packed.grad_values, chunks, 1,
                                      arguments.grad_value, plan.grad_value, sum(1));
        }
      });
  write_pad_gradient<Format>(plan, pad_sums, 0, arguments.grad_pad_key);
  write_pad_gradient<Format>(plan, pad_sums, 1, arguments.grad_pad_value);
}

}  // namespace

int64_t forward_workspace_floats(const Problem& problem) {
  return Schedule(Plan(problem), false).workspace;
}

int64_t backward_workspace_floats(const Problem& problem) {
  return Schedule(Plan(problem), true).workspace;
}

void forward(const Problem& problem, const Forward& arguments) {
  const Plan plan(problem);
  with_format(problem.dtype, [&](auto format) { forward<decltype(format)>(plan, arguments); });
}

void backward(const Problem& problem, const Backward& arguments) {
  const Plan plan(problem);
  with_format(problem.dtype, [&](auto format) { backward<decltype(format)>(plan, arguments); });
}

}  // namespace vfmk::rel_pos_attention::cpu::VFMK_ISA
