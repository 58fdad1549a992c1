// What the PyTorch boundaries of the operators that convolve at stride 1 share: tensors become the
// plain data of convolution.h.
#pragma once

#include <vector>

#include "boundary.h"
#include "convolution.h"

// For an operator's namespace `cpu`: its kernels, which a file under cpu/ has compiled for each
// instruction set, declared and dispatched to those in force.
#define VFMK_DECLARE_CONVOLUTION(isa)                                                           \
  namespace isa {                                                                               \
  int64_t workspace_floats(const Problem& problem);                                             \
  void forward(const Problem& problem, const void* input, const void* weight, const void* bias, \
               void* output);                                                                   \
  void backward(const Problem& problem, const Backward& arguments);                             \
  }
#define VFMK_DECLARE_AND_DISPATCH_CONVOLUTION                                                    \
  VFMK_DECLARE_CONVOLUTION(baseline)                                                             \
  VFMK_DECLARE_CONVOLUTION(avx2)                                                                 \
  VFMK_DECLARE_CONVOLUTION(avx512)                                                               \
  int64_t workspace_floats(const Problem& problem) { VFMK_DISPATCH(workspace_floats(problem)); } \
  void forward(const Problem& problem, const void* input, const void* weight, const void* bias,  \
               void* output) {                                                                   \
    VFMK_DISPATCH(forward(problem, input, weight, bias, output));                                \
  }                                                                                              \
  void backward(const Problem& problem, const Backward& arguments) {                             \
    VFMK_DISPATCH(backward(problem, arguments));                                                 \
  }

namespace vfmk::convolution {

using Sizes = std::vector<int64_t>;

inline Strides dense(bool channels_last, int64_t channels, int64_t height, int64_t width) {
  if (channels_last) return {height * width * channels, 1, width * channels, channels};
  return {channels * height * width, height * width, width, 1};
}

// `image` is output or grad_output, `padding` [top, bottom, left, right], `dilation` [height,
// width]. What is below and to the right shows in the size of the image.
inline Problem describe(const char* op, const Tensor& input, const Tensor& weight,
                        const Sizes& padding, const Sizes& dilation, const Tensor& image) {
  Problem problem{};
  problem.dtype = dtype_of(input, op);
  problem.channels_last = input.stride(3) != 1 && input.stride(1) == 1;
  problem.shared_weight = weight.size(0) == 1;
  problem.batch = input.size(0);
  problem.channels = input.size(1);
  problem.output_channels = weight.size(1);
  problem.input_height = static_cast<int32_t>(input.size(2));
  problem.input_width = static_cast<int32_t>(input.size(3));
  problem.output_height = static_cast<int32_t>(image.size(2));
  problem.output_width = static_cast<int32_t>(image.size(3));
  problem.kernel_height = static_cast<int32_t>(weight.size(weight.dim() - 2));
  problem.kernel_width = static_cast<int32_t>(weight.size(weight.dim() - 1));
  problem.pad_top = static_cast<int32_t>(padding[0]);
  problem.pad_left = static_cast<int32_t>(padding[2]);
  problem.dilation_height = static_cast<int32_t>(dilation[0]);
  problem.dilation_width = static_cast<int32_t>(dilation[1]);
  problem.input = {input.stride(0), input.stride(1), input.stride(2), input.stride(3)};
  problem.output = dense(problem.channels_last, problem.output_channels, problem.output_height,
                         problem.output_width);
  problem.grad_input =
      dense(problem.channels_last, problem.channels, problem.input_height, problem.input_width);
  return problem;
}

inline bool is_shared(const MaybeTensor& bias) { return bias && bias->size(0) == 1; }

inline Layout input_layout(const Problem& problem) {
  return problem.channels_last ? Layout::dense_channels : Layout::dense_last;
}

inline Problem describe_forward(const char* op, const Tensor& input, const Tensor& weight,
                                const MaybeTensor& bias, const Sizes& padding,
                                const Sizes& dilation, const Tensor& output) {
  Problem problem = describe(op, input, weight, padding, dilation, output);
  problem.shared_bias = is_shared(bias);
  check_arguments(op, input.scalar_type(),
                  {{"input", input, input_layout(problem)},
                   {"weight", weight, Layout::contiguous},
                   {"bias", bias, Layout::contiguous},
                   {"output", output, Layout::packed}});
  return problem;
}

inline Problem describe_backward(const char* op, const Tensor& grad_output, const Tensor& input,
                                 const Tensor& weight, const Sizes& padding, const Sizes& dilation,
                                 const MaybeTensor& grad_input, const MaybeTensor& grad_weight,
                                 const MaybeTensor& grad_bias) {
  Problem problem = describe(op, input, weight, padding, dilation, grad_output);
  problem.shared_bias = is_shared(grad_bias);
  check_arguments(op, input.scalar_type(),
                  {{"grad_output", grad_output, Layout::packed},
                   {"input", input, input_layout(problem)},
                   {"weight", weight, Layout::contiguous},
                   {"grad_input", grad_input, Layout::packed},
                   {"grad_weight", grad_weight, Layout::contiguous},
                   {"grad_bias", grad_bias, Layout::contiguous}});
  return problem;
}

inline Backward pointers(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                         const MaybeTensor& grad_input, const MaybeTensor& grad_weight,
                         const MaybeTensor& grad_bias, const Tensor& workspace) {
  return {grad_output.const_data_ptr(),
          input.const_data_ptr(),
          weight.const_data_ptr(),
          mutable_data(grad_input),
          mutable_data(grad_weight),
          mutable_data(grad_bias),
          static_cast<float*>(workspace.mutable_data_ptr())};
}

}  // namespace vfmk::convolution
