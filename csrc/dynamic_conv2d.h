// What the PyTorch boundary (dynamic_conv2d.cpp) and the kernels (cpu/) agree on.
//
//   output[b,o,y,x] = bias[b,o] + sum over c,i,j of weight[b,o,c,i,j] *
//     input[b, c, y - pad_top + i*dilation_height, x - pad_left + j*dilation_width]
//
// with zeros outside the input.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace vfmk::dynamic_conv2d {

struct Strides {  // in elements
  int64_t batch, channel, row, column;
};

struct Problem {
  DType dtype;         // of every activation, weight, bias and gradient; sums are fp32
  bool channels_last;  // true: channel stride 1 in every activation; false: column stride 1
  bool shared_weight;  // weight is [1,O,C,kh,kw]: one kernel set for the whole batch
  bool shared_bias;    // bias is [1,O]
  int64_t batch, input_channels, output_channels;
  int32_t input_height, input_width, output_height, output_width;
  int32_t kernel_height, kernel_width;
  int32_t pad_top, pad_left;
  int32_t dilation_height, dilation_width;
  Strides input;       // a view: any batch, row and remaining strides
  Strides output;      // output and grad_output, dense
  Strides grad_input;  // dense
  // weight [B or 1,O,C,kh,kw], bias [B or 1,O] and their gradients are contiguous.
};

// Pointers of one backward call. A null gradient is not computed.
struct Backward {
  const void* grad_output;
  const void* input;
  const void* weight;
  void* grad_input;
  void* grad_weight;
  void* grad_bias;
  float* workspace;  // workspace_floats(problem) of them, uninitialised
};

namespace cpu {
int64_t workspace_floats(const Problem& problem);
void forward(const Problem& problem, const void* input, const void* weight, const void* bias,
             void* output);
void backward(const Problem& problem, const Backward& arguments);
}  // namespace cpu

}  // namespace vfmk::dynamic_conv2d
