// What the PyTorch boundary (adapter_attention.cpp) and the CPU kernels agree on. Plain data, no
// torch.
//
//   query, key, value [B, heads, N, d] = input * qkv_weight^T + qkv_bias,  d = rank / heads
//   output = softmax(scale * query * key^T) * value
//
// with the heads side by side in each token of the output.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace vfmk::adapter_attention {

struct Strides {  // in elements; the last dimension is dense
  int64_t batch, token;
};

struct Problem {
  DType dtype;  // of every tensor but log_sum_exp; sums are fp32
  int64_t batch, tokens, rank, heads;
  float scale;
  Strides input, grad_output;
  // qkv_weight [3*rank, rank], qkv_bias [3*rank], output and grad_input [batch, tokens, rank], and
  // log_sum_exp, float [batch, heads, tokens], are contiguous.
};

struct Forward {
  const void *input, *qkv_weight, *qkv_bias;
  void* output;
  float* log_sum_exp;
  float* workspace;  // forward_workspace_floats(problem) of them, uninitialised
};

// A null gradient is not computed.
struct Backward {
  const void *grad_output, *input, *qkv_weight, *qkv_bias, *output;
  const float* log_sum_exp;
  void *grad_input, *grad_weight, *grad_bias;
  float* workspace;  // backward_workspace_floats(problem) of them, uninitialised
};

}  // namespace vfmk::adapter_attention
