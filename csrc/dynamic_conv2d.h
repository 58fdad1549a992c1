// What the PyTorch boundary (dynamic_conv2d.cpp) and the kernels (cpu/) agree on.
//
//   output[b,o,y,x] = bias[b,o] + sum over c,i,j of weight[b,o,c,i,j] *
//     input[b, c, y - pad_top + i*dilation_height, x - pad_left + j*dilation_width]
//
// with zeros outside the input.
#pragma once

#include "convolution.h"

namespace vfmk::dynamic_conv2d {

using convolution::Backward;
using convolution::Problem;

}  // namespace vfmk::dynamic_conv2d
