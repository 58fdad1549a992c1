// What the PyTorch boundary (rel_pos_attention.cpp) and the CPU kernels agree on. Plain data, no
// torch.
//
// Attention inside windows of a grid of tokens, with SAM's decomposed relative position. A query at
// row y and column x of its window, and a key at row i and column j of the same window, score
//
//   scale * <query, key> + relative[rows - 1 - y + i] + relative[2*rows - 1 + columns - 1 - x + j]
//
// where rows x columns is the window and `relative` belongs to the query: its products with both
// tables of relative positions, one after the other, each from the most distant key above (left) to
// the most distant below (right). Global attention is one window as large as the grid. Windows
// start at the grid's first token; those at its bottom and right edges may reach beyond the grid,
// and the keys and values there are `pad_key` and `pad_value`. Queries there do not exist.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace vfmk::rel_pos_attention {

struct Strides {  // in elements; the last dimension, head width or positions, is dense
  int64_t batch, row, column, head;
};

struct Problem {
  DType dtype;  // of every tensor but logsumexp; sums are fp32
  int64_t batch, heads;
  int32_t height, width;                // of the grid
  int32_t window_height, window_width;  // of a window
  int32_t head_width;                   // 1 to 128
  float scale;
  bool has_padding;  // windows reach beyond the grid
  Strides query, key, value, relative, output;
  Strides grad_output, grad_query, grad_key, grad_value, grad_relative;
  // pad_key, pad_value and their gradients are [heads, head_width], dense; logsumexp is float
  // [batch, heads, height, width], dense.
};

struct Forward {
  const void *query, *key, *value, *relative, *pad_key, *pad_value;
  void* output;
  float* logsumexp;
  float* workspace;  // forward_workspace_floats(problem) of them, uninitialised
};

// A null gradient is not computed.
struct Backward {
  const void *grad_output, *query, *key, *value, *relative, *pad_key, *pad_value, *output;
  const float* logsumexp;
  void *grad_query, *grad_key, *grad_value, *grad_relative, *grad_pad_key, *grad_pad_value;
  float* workspace;  // backward_workspace_floats(problem) of them, uninitialised
};

}  // namespace vfmk::rel_pos_attention
