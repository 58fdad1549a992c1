// What the PyTorch boundary (layer_norm_2d.cpp) and the CPU kernels agree on. Plain data, no torch.
//
//   output[b,c,y,x] = weight[i] * (input[b,i,y,x] - mean[b,y,x]) * rstd[b,y,x] + bias[i]
//
// with i = index[c], mean and variance over the input's channels, rstd = 1 / sqrt(variance + eps).
#pragma once

#include <cstdint>

#include "dtype.h"
#include "strides.h"

namespace vfmk::layer_norm_2d {

struct Problem {
  DType dtype;         // of every tensor but mean and rstd; sums are fp32
  bool channels_last;  // true: channel stride 1 in every activation; false: column stride 1
  int64_t batch, input_channels, output_channels, rows, columns;
  float eps;
  Strides input;       // a view: any batch, row and remaining strides
  Strides output;      // output and grad_output, dense
  Strides grad_input;  // dense
  // weight, bias and their gradients [input_channels], index [output_channels], each of its
  // entries in [0, input_channels), and mean and rstd [batch, rows, columns] are contiguous.
};

struct Forward {
  const void *input, *weight, *bias;
  const int64_t* index;  // null: the identity
  void* output;
  float *mean, *rstd;
  float* workspace;  // forward_workspace_floats(problem) of them, uninitialised
};

// A null gradient is not computed.
struct Backward {
  const void *grad_output, *input, *weight;
  const int64_t* index;  // null: the identity
  const float *mean, *rstd;
  void *grad_input, *grad_weight, *grad_bias;
  float* workspace;  // backward_workspace_floats(problem) of them, uninitialised
};

}  // namespace vfmk::layer_norm_2d
