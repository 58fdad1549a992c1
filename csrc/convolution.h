// What the operators that convolve at stride 1 pass to their kernels. Plain data, no torch: the
// CUDA sources compile against it.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "strides.h"

namespace vfmk::convolution {

struct Problem {
  DType dtype;         // of every activation, weight, bias and gradient; sums are fp32
  bool channels_last;  // true: channel stride 1 in every activation; false: column stride 1
  bool shared_weight;  // weight has a batch of 1: one kernel set for all samples
  bool shared_bias;    // bias too
  int64_t batch, channels, output_channels;  // depthwise: as many of both
  int32_t input_height, input_width, output_height, output_width;
  int32_t kernel_height, kernel_width;
  int32_t pad_top, pad_left;
  int32_t dilation_height, dilation_width;
  Strides input;       // a view: any batch, row and remaining strides
  Strides output;      // output and grad_output, dense
  Strides grad_input;  // dense
  // weight, bias and their gradients are contiguous.
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

}  // namespace vfmk::convolution
