// What the PyTorch boundary (dynamic_depthwise_conv2d.cpp) and the kernels (cpu/, cuda/) agree on.
// Plain data, no torch: the CUDA sources compile against this header alone.
//
//   output[b,c,y,x] = bias[b,c] + sum over i,j of weight[b,c,i,j] *
//     input[b, c, y - pad_top + i*dilation_height, x - pad_left + j*dilation_width]
//
// with zeros outside the input.
#pragma once

#include "convolution.h"

namespace vfmk::dynamic_depthwise_conv2d {

using convolution::Backward;
using convolution::Problem;

namespace cuda {
int64_t workspace_floats(const Problem& problem);
// Launch on `stream` (a cudaStream_t) of the current device. Null, or what went wrong.
const char* forward(const Problem& problem, const void* input, const void* weight, const void* bias,
                    void* output, void* stream);
const char* backward(const Problem& problem, const Backward& arguments, void* stream);
}  // namespace cuda

}  // namespace vfmk::dynamic_depthwise_conv2d
