// Pooling of tokens by softmax similarity to queries, on the CPU.
//
// Few queries, many tokens: one pass over the tokens, TILE of them at a time. The queries lie in
// lanes, and so the tokens, which are keys and values at once, are read as they come:
//
//   both       scores = tokens * queries^T, [tokens][queries]
//   forward    weights = exp2(scores - maximum so far)
//              sums = exp2(old maximum - new maximum) * sums + weights^T * tokens
//   backward   scores beside tokens * grad_outputs^T, in one product
//              weights = exp2(scores - log_sum_exp)
//              grad_scores = weights * (tokens * grad_outputs^T - delta)
//              grad_tokens = weights * grad_outputs + grad_scores * queries, in one product
//              grad_queries += grad_scores^T * tokens
//
// Forward shares out chunks of each sample's tokens, with a maximum and sums of their own; backward
// parts of all tokens, with gradients of the queries of their own. They are put together in order,
// and follow from the problem alone, not from the number of threads.
//
// B samples of N tokens of width D, M queries: forward is 4BNMD FLOP and BNM exponentials and reads
// BND elements; backward is 10BNMD FLOP and BNM exponentials, reads BND elements and writes BND. At
// M = 16, fp32, forward does 16 FLOP for each byte: the floor is the rate of the multiply-add
// units, of which the scores, one vector of 16 queries for six tokens at a time, cannot
// keep all busy. On a core with 268 GFLOP/s, 4096 tokens of width 64 take 1.9 times the floor,
// backward 1.7 times.
#include "../attention_pool.h"

#include <cfloat>
#include <cmath>

#include "../parallel.h"
#include "attention.h"

namespace vfmk::attention_pool::cpu::VFMK_ISA {
namespace {

constexpr int64_t TILE = 48;           // tokens; TILE_ROWS divides it
constexpr int64_t CHUNK_TOKENS = 512;  // at least
constexpr int64_t TASKS = 16;          // at most, where the batch alone does not make as many
constexpr int64_t PART_TILES = 8;      // at least

// The problem, and what follows from it.
struct Plan : Problem {
  int64_t row;           // width to whole vectors
  int64_t lanes;         // queries to whole vectors
  int64_t chunks;        // of a sample's tokens
  int64_t tiles, parts;  // of all samples

  explicit Plan(const Problem& problem) : Problem(problem) {
    row = round_up(width, LANES);
    lanes = round_up(queries, LANES);
    chunks = clamp(TASKS / batch, 1, maximum(tokens / CHUNK_TOKENS, 1));
    tiles = ceil_div(tokens, TILE);
    parts = clamp(batch * tiles / PART_TILES, 1, TASKS);
  }
};

// Rows of fp32 that end in whole vectors, an even number of them.
struct Rows {
  const float* data;
  int64_t row, count;  // count: without the one that makes it even
};

// Some tokens of a sample: in place where they are such rows already, else packed into scratch.
template <typename Format>
Rows token_rows(const Plan& plan, const void* tokens, int64_t sample, int64_t begin, int64_t end,
                float* scratch) {
  const int64_t count = minimum(TILE, end - begin);
  const auto* from = static_cast<const typename Format::Element*>(tokens) +
                     sample * plan.token.batch + begin * plan.token.row;
  if constexpr (sizeof *from == sizeof(float)) {
    if (plan.width == plan.row && count % 2 == 0) return {from, plan.token.row, count};
  }
  pack_rows<Format>(from, plan.token.row, count, plan.width, 1, scratch, round_up(count, 2),
                    plan.row);
  return {scratch, plan.row, count};
}

// What a chunk of a sample's tokens comes to.
struct Partial {
  float *top, *total;  // [lanes]
  float* sums;         // [lanes][row]
  int64_t floats;

  Partial(const Plan& plan, float* data) {
    Memory memory{data};
    top = memory.take(plan.lanes);
    total = memory.take(plan.lanes);
    sums = memory.take(plan.lanes * plan.row);
    floats = memory.floats;
  }
};

struct ForwardWorkspace {
  float* columns;   // [row][lanes], queries times scale and log2(e)
  float* partials;  // [batch][chunk]
  int64_t partial_floats, floats;

  ForwardWorkspace(const Plan& plan, float* data) {
    Memory memory{data};
    partial_floats = Partial(plan, nullptr).floats;
    columns = memory.take(plan.row * plan.lanes);
    partials = memory.take(plan.batch * plan.chunks * partial_floats);
    floats = memory.floats;
  }
  Partial partial(const Plan& plan, int64_t index) const {
    return Partial(plan, partials + index * partial_floats);
  }
};

template <typename Format>
void pool(const Plan& plan, const Forward& arguments, const float* columns, int64_t sample,
          int64_t begin, int64_t end, const Partial& partial, float* scratch) {
  Memory memory{scratch};
  float* scores = memory.take(TILE * plan.lanes);
  float* factor = memory.take(plan.lanes);
  float* packed = memory.take(TILE * plan.row);
  std::memset(partial.sums, 0, plan.lanes * plan.row * sizeof(float));
  std::memset(partial.total, 0, plan.lanes * sizeof(float));
  for (int64_t q = 0; q < plan.lanes; ++q) partial.top[q] = -FLT_MAX;
  for (int64_t t = begin; t < end; t += TILE) {
    const Rows rows = token_rows<Format>(plan, arguments.tokens, sample, t, end, packed);
    const int64_t count = round_up(rows.count, 2);
    multiply<Start::zero>(count, plan.lanes / LANES, plan.width, {rows.data, rows.row, 1},
                          {columns, plan.lanes}, scores, plan.lanes);
    mask_spare_key(scores, plan.lanes, rows.count, plan.lanes);
    soften(scores, plan.lanes, count, plan.lanes, partial.top, partial.total, factor);
    multiply<Start::scaled_sum>(round_up(plan.queries, 2), plan.row / LANES, count,
                                {scores, 1, plan.lanes}, {rows.data, rows.row}, partial.sums,
                                plan.row, factor);
  }
}

// Puts a sample's chunks together: into the first, then the output.
template <typename Format>
void write_output(const Plan& plan, const Forward& arguments, const ForwardWorkspace& workspace,
                  int64_t sample) {
  auto* output = static_cast<typename Format::Element*>(arguments.output);
  const Partial all = workspace.partial(plan, sample * plan.chunks);
  for (int64_t q = 0; q < plan.queries; ++q) {
    float* sums = all.sums + q * plan.row;
    for (int64_t i = 1; i < plan.chunks; ++i) {
      const Partial chunk = workspace.partial(plan, sample * plan.chunks + i);
      const float top = all.top[q] > chunk.top[q] ? all.top[q] : chunk.top[q];
      const float old_factor = exp2(broadcast(all.top[q] - top))[0];
      const float factor = exp2(broadcast(chunk.top[q] - top))[0];
      for (int64_t c = 0; c < plan.row; c += LANES) {
        store<Float32>(sums + c, load<Float32>(sums + c) * old_factor +
                                     load<Float32>(chunk.sums + q * plan.row + c) * factor);
      }
      all.total[q] = all.total[q] * old_factor + chunk.total[q] * factor;
      all.top[q] = top;
    }
    const int64_t at = sample * plan.queries + q;
    write_row<Format>(sums, plan.width, 1 / all.total[q], output + at * plan.width);
    arguments.log_sum_exp[at] = all.top[q] * LN2 + std::log(all.total[q]);
  }
}

template <typename Format>
void forward(const Plan& plan, const Forward& arguments) {
  const ForwardWorkspace workspace(plan, arguments.workspace);
  const auto* queries = static_cast<const typename Format::Element*>(arguments.queries);
  float* rows = thread_scratch(plan.lanes * plan.row);
  pack_rows<Format>(queries, plan.width, plan.queries, plan.width, plan.scale, rows, plan.lanes,
                    plan.row);
  transpose(rows, plan.row, plan.lanes, plan.row, LOG2E, workspace.columns, plan.lanes);
  const int64_t work = 2 * plan.tokens / plan.chunks * plan.lanes * plan.width;
  parallel_for(plan.batch * plan.chunks, grain_of(work), [&](int64_t begin, int64_t end) {
    float* scratch = thread_scratch(TILE * (plan.lanes + plan.row) + plan.lanes + 3 * 16);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = i % plan.chunks;
      pool<Format>(plan, arguments, workspace.columns, i / plan.chunks,
                   chunk * plan.tokens / plan.chunks, (chunk + 1) * plan.tokens / plan.chunks,
                   workspace.partial(plan, i), scratch);
    }
  });
  const int64_t merge = plan.chunks * plan.queries * plan.row;
  parallel_for(plan.batch, grain_of(merge), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) write_output<Format>(plan, arguments, workspace, b);
  });
}

// The factors of a sample's products, zeros in lanes and rows to spare.
struct Factors {
  float* columns;              // [row][2][lanes]: queries times scale and log2(e); grad_output
  float* rows;                 // [2][lanes][row]: grad_output; queries times scale
  float *log_sum_exp, *delta;  // [lanes]; the former times log2(e)
  int64_t floats;

  Factors(const Plan& plan, float* data) {
    Memory memory{data};
    columns = memory.take(2 * plan.row * plan.lanes);
    rows = memory.take(2 * plan.row * plan.lanes);
    log_sum_exp = memory.take(plan.lanes);
    delta = memory.take(plan.lanes);
    floats = memory.floats;
  }
};

struct BackwardWorkspace {
  float* factors;       // [batch]
  float* grad_queries;  // [part][lanes][row]
  int64_t factors_floats, floats;

  BackwardWorkspace(const Plan& plan, float* data) {
    Memory memory{data};
    factors_floats = Factors(plan, nullptr).floats;
    factors = memory.take(plan.batch * factors_floats);
    grad_queries = memory.take(plan.parts * plan.lanes * plan.row);
    floats = memory.floats;
  }
  Factors of_sample(const Plan& plan, int64_t sample) const {
    return Factors(plan, factors + sample * factors_floats);
  }
};

template <typename Format>
void pack_factors(const Plan& plan, const Backward& arguments, int64_t sample,
                  const Factors& factors) {
  using Element = const typename Format::Element;
  const int64_t square = plan.lanes * plan.row, at = sample * plan.queries;
  const auto* output = static_cast<Element*>(arguments.output) + at * plan.width;
  pack_rows<Format>(static_cast<Element*>(arguments.grad_output) + sample * plan.grad_output.batch,
                    plan.grad_output.row, plan.queries, plan.width, 1, factors.rows, plan.lanes,
                    plan.row);
  pack_rows<Format>(static_cast<Element*>(arguments.queries), plan.width, plan.queries, plan.width,
                    plan.scale, factors.rows + square, plan.lanes, plan.row);
  transpose(factors.rows + square, plan.row, plan.lanes, plan.row, LOG2E, factors.columns,
            2 * plan.lanes);
  transpose(factors.rows, plan.row, plan.lanes, plan.row, 1, factors.columns + plan.lanes,
            2 * plan.lanes);
  for (int64_t q = 0; q < plan.lanes; ++q) {
    factors.log_sum_exp[q] = factors.delta[q] = 0;
    if (q >= plan.queries) continue;
    Vec delta = {};
    for (int64_t c = 0; c < plan.width; c += LANES) {
      delta += load<Format>(output + q * plan.width + c, plan.width - c) *
               load<Float32>(factors.rows + q * plan.row + c);
    }
    factors.delta[q] = sum_of_lanes(delta);
    factors.log_sum_exp[q] = arguments.log_sum_exp[at + q] * LOG2E;
  }
}

// The gradients of a tile's tokens, and what they add to grad_queries.
template <typename Format>
void differentiate(const Plan& plan, const Backward& arguments, const Factors& factors,
                   int64_t sample, int64_t begin, float* grad_queries, float* scratch) {
  Memory memory{scratch};
  float* scores = memory.take(2 * TILE * plan.lanes);
  float* packed = memory.take(TILE * plan.row);
  float* sums = memory.take(TILE * plan.row);
  const int64_t row = 2 * plan.lanes;
  float* gradients = scores + plan.lanes;
  const Rows rows = token_rows<Format>(plan, arguments.tokens, sample, begin, plan.tokens, packed);
  const int64_t count = round_up(rows.count, 2);
  multiply<Start::zero>(count, row / LANES, plan.width, {rows.data, rows.row, 1},
                        {factors.columns, row}, scores, row);
  differentiate_softmax(scores, gradients, row, rows.count, plan.lanes, factors.log_sum_exp,
                        factors.delta);
  if (arguments.grad_queries) {
    multiply<Start::sum>(round_up(plan.queries, 2), plan.row / LANES, rows.count,
                         {gradients, 1, row}, {rows.data, rows.row}, grad_queries, plan.row);
  }
  if (arguments.grad_tokens) {
    multiply<Start::zero>(count, plan.row / LANES, row, {scores, row, 1}, {factors.rows, plan.row},
                          sums, plan.row);
    auto* grad_tokens = static_cast<typename Format::Element*>(arguments.grad_tokens) +
                        (sample * plan.tokens + begin) * plan.width;
    for (int64_t n = 0; n < rows.count; ++n) {
      write_row<Format>(sums + n * plan.row, plan.width, 1, grad_tokens + n * plan.width);
    }
  }
}

template <typename Format>
void backward(const Plan& plan, const Backward& arguments) {
  const BackwardWorkspace workspace(plan, arguments.workspace);
  parallel_for(plan.batch, grain_of(2 * plan.lanes * plan.row), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      pack_factors<Format>(plan, arguments, b, workspace.of_sample(plan, b));
    }
  });
  const int64_t square = plan.lanes * plan.row;
  parallel_for(plan.parts, 1, [&](int64_t begin, int64_t end) {
    float* scratch = thread_scratch(2 * TILE * (plan.lanes + plan.row) + 3 * 16);
    for (int64_t part = begin; part < end; ++part) {
      float* grad_queries = workspace.grad_queries + part * square;
      std::memset(grad_queries, 0, square * sizeof(float));
      const int64_t tiles = plan.batch * plan.tiles;
      for (int64_t t = part * tiles / plan.parts; t < (part + 1) * tiles / plan.parts; ++t) {
        const int64_t sample = t / plan.tiles;
        differentiate<Format>(plan, arguments, workspace.of_sample(plan, sample), sample,
                              t % plan.tiles * TILE, grad_queries, scratch);
      }
    }
  });
  if (arguments.grad_queries == nullptr) return;
  auto* grad_queries = static_cast<typename Format::Element*>(arguments.grad_queries);
  for (int64_t q = 0; q < plan.queries; ++q) {
    for (int64_t c = 0; c < plan.width; c += LANES) {
      const float* first = workspace.grad_queries + q * plan.row + c;
      Vec sum = load<Float32>(first);
      for (int64_t i = 1; i < plan.parts; ++i) sum += load<Float32>(first + i * square);
      store<Format>(grad_queries + q * plan.width + c, sum * plan.scale, plan.width - c);
    }
  }
}

}  // namespace

int64_t forward_workspace_floats(const Problem& problem) {
  return ForwardWorkspace(Plan(problem), nullptr).floats;
}

int64_t backward_workspace_floats(const Problem& problem) {
  return BackwardWorkspace(Plan(problem), nullptr).floats;
}

void forward(const Problem& problem, const Forward& arguments) {
  const Plan plan(problem);
  with_format(problem.dtype, [&](auto format) { forward<decltype(format)>(plan, arguments); });
}

void backward(const Problem& problem, const Backward& arguments) {
  const Plan plan(problem);
  with_format(problem.dtype, [&](auto format) { backward<decltype(format)>(plan, arguments); });
}

}  // namespace vfmk::attention_pool::cpu::VFMK_ISA
