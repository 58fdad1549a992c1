// Self-attention with its projections inside, on the CPU.
//
// Three passes over a workspace that is linear in the tokens, each shared out among the threads:
//
//   project        queries (times scale), keys and values of every head, as packed rows. The bias
//                  is one more column of the weight, for an input of 1.
//   attend         blocks of QUERIES queries of one head walk over tiles of TILE_KEYS keys:
//     forward        scores = keys * queries^T, [keys][queries]
//                    weights = exp2(scores - maximum so far)
//                    sums = exp2(old maximum - new maximum) * sums + values^T * weights
//     backward       weights = exp2(scores - log_sum_exp)
//                    grad_scores = weights * (values * grad_outputs^T - delta)
//                    grad_queries += keys^T * grad_scores
//                    grad_keys += grad_scores * queries
//                    grad_values += weights * grad_outputs
//   back to input  backward alone: grad_input, grad_weight and grad_bias from those of the
//                  projections
//
// With the queries in lanes, every product but the last two has tiles of whole registers whatever
// the head width, and keys and values are read as the projection leaves them. Scores, sums and a
// tile of keys and values, 40 KiB at head width 32, stay in the first cache.
//
// Backward shares out chunks of queries, each with sums of its own for all keys, which are added up
// in order, and likewise parts of the tokens for grad_weight. Both follow from the problem alone,
// not from the number of threads.
//
// N tokens of width r in h heads: forward is 6Nr^2 + 4N^2 r FLOP and N^2 h exponentials, backward
// 18Nr^2 + 10N^2 r and N^2 h; forward reads Nr elements and writes Nr, backward 3Nr and Nr. The
// floor is the rate of the multiply-add units; at head width 32 the softmax adds a quarter to it.
// On a core with 268 GFLOP/s, 4096 tokens of width 32 take 1.45 times the floor, backward 1.35
// times.
#include "../adapter_attention.h"

#include <cfloat>
#include <cmath>

#include "../parallel.h"
#include "attention.h"

namespace vfmk::adapter_attention::cpu::VFMK_ISA {
namespace {

constexpr int64_t QUERIES = 64;    // of a block; the registers of one tile, LANES divides it
constexpr int64_t TILE_KEYS = 48;  // TILE_ROWS divides it
constexpr int64_t TILE_TOKENS = 64;
constexpr int64_t CHUNKS = 8;         // of a head's queries, at most
constexpr int64_t CHUNK_BLOCKS = 4;   // at least
constexpr int64_t TASKS = 16;         // of backward, where the batch alone does not make as many
constexpr int64_t WEIGHT_PARTS = 16;  // of all tokens, at most
constexpr int64_t WEIGHT_TILES = 8;   // of a part, at least

enum Part { QUERY, KEY, VALUE, PARTS };

// The problem, and what follows from it.
struct Plan : Problem {
  int64_t head_width, width;          // of a head; that to whole vectors
  int64_t rank_row;                   // rank to whole vectors
  int64_t input_row;                  // rank and the 1 after it to whole vectors
  int64_t rows;                       // tokens to whole vectors
  int64_t sequences;                  // of all samples and heads
  int64_t blocks, chunks;             // of the queries of a sequence
  int64_t token_tiles, weight_parts;  // of all samples

  explicit Plan(const Problem& problem) : Problem(problem) {
    head_width = rank / heads;
    width = round_up(head_width, LANES);
    rank_row = round_up(rank, LANES);
    input_row = round_up(rank + 1, LANES);
    rows = round_up(tokens, LANES);
    sequences = batch * heads;
    blocks = ceil_div(tokens, QUERIES);
    chunks = clamp(TASKS / sequences, 1, clamp(blocks / CHUNK_BLOCKS, 1, CHUNKS));
    token_tiles = batch * ceil_div(tokens, TILE_TOKENS);
    weight_parts = clamp(token_tiles / WEIGHT_TILES, 1, WEIGHT_PARTS);
  }
  int64_t sequence_floats() const { return rows * width; }
};

// All of it fp32, zeros in the columns that fill a vector. Scaled: queries come times `scale`.
struct Workspace {
  float* weight_rows;  // [part][head][head_width][rank_row], scaled
  float* weights;      // [part][head][rank + 1][width], scaled: the transpose, and the bias
  float* projections;  // [part][sequence][rows][width], scaled
  float *grad_queries = nullptr, *grad_keys = nullptr, *grad_values = nullptr;
  float* grad_weights = nullptr;  // [weight part][part][head][width][input_row]
  int64_t floats;

  Workspace(const Plan& plan, bool backward, float* data) {
    Memory memory{data};
    const int64_t sequences = plan.sequences * plan.sequence_floats();
    weight_rows = memory.take(PARTS * plan.rank * plan.rank_row);
    weights = memory.take(PARTS * plan.heads * (plan.rank + 1) * plan.width);
    projections = memory.take(PARTS * sequences);
    if (backward) {
      grad_queries = memory.take(sequences);
      grad_keys = memory.take(plan.chunks * sequences);  // [chunk][sequence][rows][width]
      grad_values = memory.take(plan.chunks * sequences);
      grad_weights =
          memory.take(plan.weight_parts * PARTS * plan.heads * plan.width * plan.input_row);
    }
    floats = memory.floats;
  }
  float* projection(const Plan& plan, int64_t part, int64_t sequence) const {
    return projections + (part * plan.sequences + sequence) * plan.sequence_floats();
  }
};

template <typename Format>
void pack_weights(const Plan& plan, const void* qkv_weight, const void* qkv_bias,
                  const Workspace& workspace) {
  using Element = const typename Format::Element;
  for (int64_t i = 0; i < PARTS * plan.heads; ++i) {
    const int64_t first = i * plan.head_width;
    const float factor = i / plan.heads == QUERY ? plan.scale : 1;
    float* rows = workspace.weight_rows + first * plan.rank_row;
    float* columns = workspace.weights + i * (plan.rank + 1) * plan.width;
    pack_rows<Format>(static_cast<Element*>(qkv_weight) + first * plan.rank, plan.rank,
                      plan.head_width, plan.rank, factor, rows, plan.head_width, plan.rank_row);
    std::memset(columns, 0, plan.rank * plan.width * sizeof(float));
    for (int64_t c = 0; c < plan.head_width; ++c) {
      for (int64_t k = 0; k < plan.rank; ++k) {
        columns[k * plan.width + c] = rows[c * plan.rank_row + k];
      }
    }
    pack_rows<Format>(static_cast<Element*>(qkv_bias) + first, 0, 1, plan.head_width, factor,
                      columns + plan.rank * plan.width, 1, plan.width);
  }
}

// Some tokens of one sample.
struct TokenTile {
  int64_t sample, begin, count, rows;  // rows: count to whole vectors

  TokenTile(const Plan& plan, int64_t index) {
    const int64_t tiles = ceil_div(plan.tokens, TILE_TOKENS);
    sample = index / tiles;
    begin = index % tiles * TILE_TOKENS;
    count = minimum(TILE_TOKENS, plan.tokens - begin);
    rows = round_up(count, LANES);
  }
};

// [rows][input_row]: the tokens, each followed by a 1; zeros in rows to spare.
template <typename Format>
void pack_input(const Plan& plan, const TokenTile& tile, const void* input, float* to) {
  const auto* from = static_cast<const typename Format::Element*>(input) +
                     tile.sample * plan.input.batch + tile.begin * plan.input.token;
  pack_rows<Format>(from, plan.input.token, tile.count, plan.rank, 1, to, tile.rows,
                    plan.input_row);
  for (int64_t n = 0; n < tile.count; ++n) to[n * plan.input_row + plan.rank] = 1;
}

template <typename Format>
void project(const Plan& plan, const void* input, const Workspace& workspace) {
  const int64_t work = TILE_TOKENS * PARTS * plan.rank * plan.rank;
  parallel_for(plan.token_tiles, grain_of(work), [&](int64_t begin, int64_t end) {
    float* packed = thread_scratch(TILE_TOKENS * plan.input_row);
    for (int64_t t = begin; t < end; ++t) {
      const TokenTile tile(plan, t);
      pack_input<Format>(plan, tile, input, packed);
      for (int64_t i = 0; i < PARTS * plan.heads; ++i) {
        const int64_t part = i / plan.heads, sequence = tile.sample * plan.heads + i % plan.heads;
        multiply<Start::zero>(
            tile.rows, plan.width / LANES, plan.rank + 1, {packed, plan.input_row, 1},
            {workspace.weights + i * (plan.rank + 1) * plan.width, plan.width},
            workspace.projection(plan, part, sequence) + tile.begin * plan.width, plan.width);
      }
    }
  });
}

// Some queries of a sequence, and what is known of them. Arrays hold QUERIES columns.
struct Block {
  int64_t sequence, begin, count, lanes;      // lanes: count to whole vectors
  float *columns, *scores, *sums;             // [width], [TILE_KEYS], [width]
  float *top, *total, *factor;                // [1]; see soften
  float* rows;                                // [QUERIES][width], of the output or of its gradient
  float *grad_columns, *grad_scores, *delta;  // of the output, [width]; [TILE_KEYS]; [1]
  int64_t floats;

  Block(const Plan& plan, float* data) {
    Memory memory{data};
    columns = memory.take(plan.width * QUERIES);
    scores = memory.take(TILE_KEYS * QUERIES);
    sums = memory.take(plan.width * QUERIES);
    top = memory.take(QUERIES);
    total = memory.take(QUERIES);
    factor = memory.take(QUERIES);
    rows = memory.take(QUERIES * plan.width);
    grad_columns = memory.take(plan.width * QUERIES);
    grad_scores = memory.take(TILE_KEYS * QUERIES);
    delta = memory.take(QUERIES);
    floats = memory.floats;
  }
  void place(const Plan& plan, int64_t of_sequence, int64_t index) {
    sequence = of_sequence;
    begin = index * QUERIES;
    count = minimum(QUERIES, plan.tokens - begin);
    lanes = round_up(count, LANES);
  }
  // Of the first of them, in a tensor [batch, tokens, heads, head_width].
  int64_t offset(const Plan& plan, const Strides& strides) const {
    return sequence / plan.heads * strides.batch + begin * strides.token +
           sequence % plan.heads * plan.head_width;
  }
};

Strides dense(const Plan& plan) { return {plan.tokens * plan.rank, plan.rank}; }

// block.scores of `keys` keys, then a spare one where that is odd; returns their number.
int64_t score(const Plan& plan, const float* key, int64_t keys, const Block& block) {
  const int64_t rows = round_up(keys, 2);
  multiply<Start::zero>(rows, block.lanes / LANES, plan.head_width, {key, plan.width, 1},
                        {block.columns, QUERIES}, block.scores, QUERIES);
  mask_spare_key(block.scores, QUERIES, keys, block.lanes);
  return rows;
}

template <typename Format>
void attend(const Plan& plan, const Forward& arguments, const Workspace& workspace,
            const Block& block) {
  const float* key = workspace.projection(plan, KEY, block.sequence);
  const float* value = workspace.projection(plan, VALUE, block.sequence);
  transpose(workspace.projection(plan, QUERY, block.sequence) + block.begin * plan.width,
            plan.width, block.lanes, plan.width, LOG2E, block.columns, QUERIES);
  std::memset(block.sums, 0, plan.width * QUERIES * sizeof(float));
  std::memset(block.total, 0, QUERIES * sizeof(float));
  for (int64_t q = 0; q < block.lanes; ++q) block.top[q] = -FLT_MAX;
  for (int64_t t = 0; t < plan.tokens; t += TILE_KEYS) {
    const int64_t keys =
        score(plan, key + t * plan.width, minimum(TILE_KEYS, plan.tokens - t), block);
    if (soften(block.scores, QUERIES, keys, block.lanes, block.top, block.total, block.factor)) {
      for (int64_t c = 0; c < plan.head_width; ++c) {
        for (int64_t q = 0; q < block.lanes; q += LANES) {
          float* sum = block.sums + c * QUERIES + q;
          store<Float32>(sum, load<Float32>(sum) * load<Float32>(block.factor + q));
        }
      }
    }
    multiply<Start::sum>(round_up(plan.head_width, 2), block.lanes / LANES, keys,
                         {value + t * plan.width, 1, plan.width}, {block.scores, QUERIES},
                         block.sums, QUERIES);
  }
  transpose(block.sums, QUERIES, plan.width, block.lanes, 1, block.rows, plan.width);
  auto* output =
      static_cast<typename Format::Element*>(arguments.output) + block.offset(plan, dense(plan));
  float* log_sum_exp = arguments.log_sum_exp + block.sequence * plan.tokens + block.begin;
  for (int64_t q = 0; q < block.count; ++q) {
    write_row<Format>(block.rows + q * plan.width, plan.head_width, 1 / block.total[q],
                      output + q * plan.rank);
    log_sum_exp[q] = block.top[q] * LN2 + std::log(block.total[q]);
  }
}

// block.top, here log_sum_exp in units of log2(e), and block.delta, the products <grad_output,
// output>.
template <typename Format>
void pack_statistics(const Plan& plan, const Backward& arguments, const Block& block) {
  const auto* output = static_cast<const typename Format::Element*>(arguments.output) +
                       block.offset(plan, dense(plan));
  const float* log_sum_exp = arguments.log_sum_exp + block.sequence * plan.tokens + block.begin;
  for (int64_t q = 0; q < block.lanes; ++q) {
    block.top[q] = block.delta[q] = 0;
    if (q >= block.count) continue;
    Vec delta = {};
    for (int64_t c = 0; c < plan.head_width; c += LANES) {
      delta += load<Format>(output + q * plan.rank + c, plan.head_width - c) *
               load<Float32>(block.rows + q * plan.width + c);
    }
    block.delta[q] = sum_of_lanes(delta);
    block.top[q] = log_sum_exp[q] * LOG2E;
  }
}

// The gradients of a block's queries, and what they add to those of the sequence's keys and values.
// These start at zero with the first block.
template <typename Format>
void differentiate(const Plan& plan, const Backward& arguments, const Workspace& workspace,
                   const Block& block, float* grad_keys, float* grad_values, bool first) {
  const auto add = first ? multiply<Start::zero> : multiply<Start::sum>;
  const int64_t vectors = plan.width / LANES;
  const float* query = workspace.projection(plan, QUERY, block.sequence) + block.begin * plan.width;
  const float* keys = workspace.projection(plan, KEY, block.sequence);
  const float* values = workspace.projection(plan, VALUE, block.sequence);
  const auto* grad_output = static_cast<const typename Format::Element*>(arguments.grad_output) +
                            block.offset(plan, plan.grad_output);
  pack_rows<Format>(grad_output, plan.grad_output.token, block.count, plan.head_width, 1,
                    block.rows, block.lanes, plan.width);
  pack_statistics<Format>(plan, arguments, block);
  transpose(query, plan.width, block.lanes, plan.width, LOG2E, block.columns, QUERIES);
  transpose(block.rows, plan.width, block.lanes, plan.width, 1, block.grad_columns, QUERIES);
  std::memset(block.sums, 0, plan.width * QUERIES * sizeof(float));
  for (int64_t t = 0; t < plan.tokens; t += TILE_KEYS) {
    const float* key = keys + t * plan.width;
    const int64_t rows = score(plan, key, minimum(TILE_KEYS, plan.tokens - t), block);
    multiply<Start::zero>(rows, block.lanes / LANES, plan.head_width,
                          {values + t * plan.width, plan.width, 1}, {block.grad_columns, QUERIES},
                          block.grad_scores, QUERIES);
    differentiate_softmax(block.scores, block.grad_scores, QUERIES, rows, block.lanes, block.top,
                          block.delta);
    multiply<Start::sum>(round_up(plan.head_width, 2), block.lanes / LANES, rows,
                         {key, 1, plan.width}, {block.grad_scores, QUERIES}, block.sums, QUERIES);
    add(rows, vectors, block.count, {block.grad_scores, QUERIES, 1}, {query, plan.width},
        grad_keys + t * plan.width, plan.width, nullptr);
    add(rows, vectors, block.count, {block.scores, QUERIES, 1}, {block.rows, plan.width},
        grad_values + t * plan.width, plan.width, nullptr);
  }
  float* grad_queries = workspace.grad_queries + block.sequence * plan.sequence_floats();
  transpose(block.sums, QUERIES, plan.width, block.lanes, 1,
            grad_queries + block.begin * plan.width, plan.width);
}

// Adds up the chunks' gradients of a tile's keys, or values, into those of the first.
void add_chunks(const Plan& plan, const TokenTile& tile, float* sums) {
  const int64_t chunk = plan.sequences * plan.sequence_floats();
  for (int64_t head = 0; head < plan.heads; ++head) {
    float* first =
        sums + (tile.sample * plan.heads + head) * plan.sequence_floats() + tile.begin * plan.width;
    for (int64_t i = 0; i < tile.count * plan.width; i += LANES) {
      Vec sum = load<Float32>(first + i);
      for (int64_t c = 1; c < plan.chunks; ++c) sum += load<Float32>(first + c * chunk + i);
      store<Float32>(first + i, sum);
    }
  }
}

// grad_input of a tile's tokens, and what they add to `grad_weights` of their part of the tokens.
template <typename Format>
void differentiate_projections(const Plan& plan, const Backward& arguments,
                               const Workspace& workspace, const TokenTile& tile,
                               float* grad_weights, float* scratch) {
  float* sums = scratch;                                  // [TILE_TOKENS][rank_row]
  float* packed = scratch + TILE_TOKENS * plan.rank_row;  // [TILE_TOKENS][input_row]
  add_chunks(plan, tile, workspace.grad_keys);
  add_chunks(plan, tile, workspace.grad_values);
  if (grad_weights) pack_input<Format>(plan, tile, arguments.input, packed);
  std::memset(sums, 0, TILE_TOKENS * plan.rank_row * sizeof(float));
  for (int64_t i = 0; i < PARTS * plan.heads; ++i) {
    const float* of_part[] = {workspace.grad_queries, workspace.grad_keys, workspace.grad_values};
    const int64_t sequence = tile.sample * plan.heads + i % plan.heads;
    const float* gradient = of_part[i / plan.heads] + sequence * plan.sequence_floats() +
                            tile.begin * plan.width;  // [tokens][width]
    if (arguments.grad_input) {
      multiply<Start::sum>(
          round_up(tile.count, 2), plan.rank_row / LANES, plan.head_width,
          {gradient, plan.width, 1},
          {workspace.weight_rows + i * plan.head_width * plan.rank_row, plan.rank_row}, sums,
          plan.rank_row);
    }
    if (grad_weights) {
      multiply<Start::sum>(round_up(plan.head_width, 2), plan.input_row / LANES, tile.count,
                           {gradient, 1, plan.width}, {packed, plan.input_row},
                           grad_weights + i * plan.width * plan.input_row, plan.input_row);
    }
  }
  if (arguments.grad_input == nullptr) return;
  auto* grad_input = static_cast<typename Format::Element*>(arguments.grad_input) +
                     (tile.sample * plan.tokens + tile.begin) * plan.rank;
  for (int64_t n = 0; n < tile.count; ++n) {
    write_row<Format>(sums + n * plan.rank_row, plan.rank, 1, grad_input + n * plan.rank);
  }
}

// Adds up the parts of the tokens. The bias's gradient stands in the column of the 1.
template <typename Format>
void write_weight_gradients(const Plan& plan, const Backward& arguments,
                            const Workspace& workspace) {
  using Element = typename Format::Element;
  const int64_t floats = PARTS * plan.heads * plan.width * plan.input_row;
  float* line = thread_scratch(plan.input_row);
  for (int64_t row = 0; row < PARTS * plan.rank; ++row) {
    const float factor = row / plan.rank == QUERY ? plan.scale : 1;
    const float* first =
        workspace.grad_weights +
        (row / plan.head_width * plan.width + row % plan.head_width) * plan.input_row;
    for (int64_t c = 0; c < plan.input_row; c += LANES) {
      Vec sum = load<Float32>(first + c);
      for (int64_t i = 1; i < plan.weight_parts; ++i) sum += load<Float32>(first + i * floats + c);
      store<Float32>(line + c, sum * factor);
    }
    if (arguments.grad_weight) {
      write_row<Format>(line, plan.rank, 1,
                        static_cast<Element*>(arguments.grad_weight) + row * plan.rank);
    }
    if (arguments.grad_bias) {
      store<Format>(static_cast<Element*>(arguments.grad_bias) + row, broadcast(line[plan.rank]),
                    1);
    }
  }
}

template <typename Format>
void forward(const Plan& plan, const Forward& arguments) {
  const Workspace workspace(plan, false, arguments.workspace);
  pack_weights<Format>(plan, arguments.qkv_weight, arguments.qkv_bias, workspace);
  project<Format>(plan, arguments.input, workspace);
  const int64_t work = 2 * QUERIES * plan.tokens * plan.head_width;
  parallel_for(plan.sequences * plan.blocks, grain_of(work), [&](int64_t begin, int64_t end) {
    Block block(plan, thread_scratch(Block(plan, nullptr).floats));
    for (int64_t i = begin; i < end; ++i) {
      block.place(plan, i / plan.blocks, i % plan.blocks);
      attend<Format>(plan, arguments, workspace, block);
    }
  });
}

template <typename Format>
void backward(const Plan& plan, const Backward& arguments) {
  const Workspace workspace(plan, true, arguments.workspace);
  pack_weights<Format>(plan, arguments.qkv_weight, arguments.qkv_bias, workspace);
  project<Format>(plan, arguments.input, workspace);
  const int64_t work = 5 * ceil_div(plan.tokens, plan.chunks) * plan.tokens * plan.head_width;
  parallel_for(plan.sequences * plan.chunks, grain_of(work), [&](int64_t begin, int64_t end) {
    Block block(plan, thread_scratch(Block(plan, nullptr).floats));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sequence = i / plan.chunks, chunk = i % plan.chunks;
      const int64_t at = (chunk * plan.sequences + sequence) * plan.sequence_floats();
      const int64_t first = chunk * plan.blocks / plan.chunks;
      for (int64_t b = first; b < (chunk + 1) * plan.blocks / plan.chunks; ++b) {
        block.place(plan, sequence, b);
        differentiate<Format>(plan, arguments, workspace, block, workspace.grad_keys + at,
                              workspace.grad_values + at, b == first);
      }
    }
  });
  const bool weights = arguments.grad_weight || arguments.grad_bias;
  const int64_t weight_floats = PARTS * plan.heads * plan.width * plan.input_row;
  parallel_for(plan.weight_parts, 1, [&](int64_t begin, int64_t end) {
    float* scratch = thread_scratch(TILE_TOKENS * (plan.rank_row + plan.input_row));
    for (int64_t part = begin; part < end; ++part) {
      float* grad_weights = weights ? workspace.grad_weights + part * weight_floats : nullptr;
      if (weights) std::memset(grad_weights, 0, weight_floats * sizeof(float));
      const int64_t last = (part + 1) * plan.token_tiles / plan.weight_parts;
      for (int64_t t = part * plan.token_tiles / plan.weight_parts; t < last; ++t) {
        differentiate_projections<Format>(plan, arguments, workspace, TokenTile(plan, t),
                                          grad_weights, scratch);
      }
    }
  });
  if (weights) write_weight_gradients<Format>(plan, arguments, workspace);
}

}  // namespace

int64_t forward_workspace_floats(const Problem& problem) {
  return Workspace(Plan(problem), false, nullptr).floats;
}

int64_t backward_workspace_floats(const Problem& problem) {
  return Workspace(Plan(problem), true, nullptr).floats;
}

void forward(const Problem& problem, const Forward& arguments) {
  const Plan plan(problem);
  with_format(problem.dtype, [&](auto format) { forward<decltype(format)>(plan, arguments); });
}

void backward(const Problem& problem, const Backward& arguments) {
  const Plan plan(problem);
  with_format(problem.dtype, [&](auto format) { backward<decltype(format)>(plan, arguments); });
}

}  // namespace vfmk::adapter_attention::cpu::VFMK_ISA
