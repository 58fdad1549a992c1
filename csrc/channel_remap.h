// What the PyTorch boundary (channel_remap.cpp) and the kernels (cpu/, cuda/) agree on. Plain data,
// no torch: the CUDA sources compile against this header alone.
//
//   output[n,c,y,x] = scale[m,c] * input[n, index[m,c], y, x],  m = n / samples
//
// Backward goes by the inverse of a map: for each input channel its readers, the output channels
// that read it, in ascending order.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "strides.h"

namespace vfmk::channel_remap {

struct Problem {
  DType dtype;         // of activations, scale and gradients; sums are fp32
  bool channels_last;  // true: channel stride 1 in every activation; false: column stride 1
  int64_t maps;        // index and scale are [maps, output_channels], contiguous
  int64_t samples;     // of each map
  int64_t input_channels, output_channels;
  int64_t rows, columns;
  Strides input;       // a view: any batch, row and remaining strides
  Strides output;      // output and grad_output, dense
  Strides grad_input;  // dense
};

struct Forward {
  const void* input;
  const int64_t* index;  // on the CPU each in [0, input_channels)
  const void* scale;     // null: 1
  void* output;
};

// A null gradient is not computed. `input` is read for grad_scale alone.
struct Backward {
  const void* grad_output;
  const void* input;
  const int64_t* index;
  const void* scale;  // null: 1
  void* grad_input;
  void* grad_scale;
  void* workspace;  // workspace_words(problem) of 4 bytes, uninitialised
};

namespace cuda {  // an index outside [0, input_channels) reads NaN
int64_t workspace_words(const Problem& problem);
// Launch on `stream` (a cudaStream_t) of the current device. Null, or what went wrong.
const char* forward(const Problem& problem, const Forward& arguments, void* stream);
const char* backward(const Problem& problem, const Backward& arguments, void* stream);
}  // namespace cuda

}  // namespace vfmk::channel_remap
