// What the PyTorch boundary (attention_pool.cpp) and the CPU kernels agree on. Plain data, no
// torch.
//
//   output[b,m] = sum over n of softmax over n of (scale * <queries[m], tokens[b,n]>) * tokens[b,n]
#pragma once

#include <cstdint>

#include "dtype.h"

namespace vfmk::attention_pool {

struct Strides {  // in elements; the last dimension is dense
  int64_t batch, row;
};

struct Problem {
  DType dtype;  // of every tensor but log_sum_exp; sums are fp32
  int64_t batch, tokens, width, queries;
  float scale;
  Strides token, grad_output;
  // queries [queries, width], output [batch, queries, width], grad_tokens, grad_queries and
  // log_sum_exp, float [batch, queries], are contiguous.
};

struct Forward {
  const void *tokens, *queries;
  void* output;
  float* log_sum_exp;
  float* workspace;  // forward_workspace_floats(problem) of them, uninitialised
};

// A null gradient is not computed.
struct Backward {
  const void *grad_output, *tokens, *queries, *output;
  const float* log_sum_exp;
  void *grad_tokens, *grad_queries;
  float* workspace;  // backward_workspace_floats(problem) of them, uninitialised
};

}  // namespace vfmk::attention_pool
