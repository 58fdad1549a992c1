// The PyTorch boundary of dynamic_conv2d: tensors become the plain data of the header.
// vfmk/ops/dynamic_conv2d.py has checked every argument and allocated every output. There
// are CPU kernels alone: Triton serves GPUs.
#include "dynamic_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "boundary.h"

namespace vfmk::dynamic_conv2d {

namespace cpu {

// The kernels of cpu/dynamic_conv2d.cpp, compiled once for each instruction set.
#define VFMK_DECLARE(isa)                                                                       \
  namespace isa {                                                                               \
  int64_t workspace_floats(const Problem& problem);                                             \
  void forward(const Problem& problem, const void* input, const void* weight, const void* bias, \
               void* output);                                                                   \
  void backward(const Problem& problem, const Backward& arguments);                             \
  }
VFMK_DECLARE(baseline)
VFMK_DECLARE(avx2)
VFMK_DECLARE(avx512)

int64_t workspace_floats(const Problem& problem) { VFMK_DISPATCH(workspace_floats(problem)); }

void forward(const Problem& problem, const void* input, const void* weight, const void* bias,
             void* output) {
  VFMK_DISPATCH(forward(problem, input, weight, bias, output));
}

void backward(const Problem& problem, const Backward& arguments) {
  VFMK_DISPATCH(backward(problem, arguments));
}

}  // namespace cpu

namespace {

constexpr const char* NAME = "dynamic_conv2d";

using Sizes = std::vector<int64_t>;

Strides dense(bool channels_last, int64_t channels, int64_t height, int64_t width) {
  if (channels_last) return {height * width * channels, 1, width * channels, channels};
  return {channels * height * width, height * width, width, 1};
}

// `image` is output or grad_output, `padding` [top, bottom, left, right], `dilation` [height,
// width]. What is below and to the right shows in the size of the image.
Problem describe(const Tensor& input, const Tensor& weight, const Sizes& padding,
                 const Sizes& dilation, const Tensor& image) {
  Problem problem{};
  problem.dtype = dtype_of(input, NAME);
  problem.channels_last = input.stride(3) != 1 && input.stride(1) == 1;
  problem.shared_weight = weight.size(0) == 1;
  problem.batch = input.size(0);
  problem.input_channels = input.size(1);
  problem.output_channels = weight.size(1);
  problem.input_height = static_cast<int32_t>(input.size(2));
  problem.input_width = static_cast<int32_t>(input.size(3));
  problem.output_height = static_cast<int32_t>(image.size(2));
  problem.output_width = static_cast<int32_t>(image.size(3));
  problem.kernel_height = static_cast<int32_t>(weight.size(3));
  problem.kernel_width = static_cast<int32_t>(weight.size(4));
  problem.pad_top = static_cast<int32_t>(padding[0]);
  problem.pad_left = static_cast<int32_t>(padding[2]);
  problem.dilation_height = static_cast<int32_t>(dilation[0]);
  problem.dilation_width = static_cast<int32_t>(dilation[1]);
  problem.input = {input.stride(0), input.stride(1), input.stride(2), input.stride(3)};
  problem.output = dense(problem.channels_last, problem.output_channels, problem.output_height,
                         problem.output_width);
  problem.grad_input = dense(problem.channels_last, problem.input_channels, problem.input_height,
                             problem.input_width);
  return problem;
}

bool is_shared(const MaybeTensor& bias) { return bias && bias->size(0) == 1; }

Layout input_layout(const Problem& problem) {
  return problem.channels_last ? Layout::dense_channels : Layout::dense_last;
}

Problem describe_forward(const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
                         const Sizes& padding, const Sizes& dilation, const Tensor& output) {
  Problem problem = describe(input, weight, padding, dilation, output);
  problem.shared_bias = is_shared(bias);
  check_arguments(NAME, input.scalar_type(),
                  {{"input", input, input_layout(problem)},
                   {"weight", weight, Layout::contiguous},
                   {"bias", bias, Layout::contiguous},
                   {"output", output, Layout::packed}});
  return problem;
}

Problem describe_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                          const Sizes& padding, const Sizes& dilation,
                          const MaybeTensor& grad_input, const MaybeTensor& grad_weight,
                          const MaybeTensor& grad_bias) {
  Problem problem = describe(input, weight, padding, dilation, grad_output);
  problem.shared_bias = is_shared(grad_bias);
  check_arguments(NAME, input.scalar_type(),
                  {{"grad_output", grad_output, Layout::packed},
                   {"input", input, input_layout(problem)},
                   {"weight", weight, Layout::contiguous},
                   {"grad_input", grad_input, Layout::packed},
                   {"grad_weight", grad_weight, Layout::contiguous},
                   {"grad_bias", grad_bias, Layout::contiguous}});
  return problem;
}

Backward pointers(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
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

void forward_cpu(Tensor input, Tensor weight, MaybeTensor bias, Sizes padding, Sizes dilation,
                 Tensor output) {
  const Problem problem = describe_forward(input, weight, bias, padding, dilation, output);
  cpu::forward(problem, input.const_data_ptr(), weight.const_data_ptr(), data(bias),
               output.mutable_data_ptr());
}

void backward_cpu(Tensor grad_output, Tensor input, Tensor weight, Sizes padding, Sizes dilation,
                  MaybeTensor grad_input, MaybeTensor grad_weight, MaybeTensor grad_bias) {
  const Problem problem = describe_backward(grad_output, input, weight, padding, dilation,
                                            grad_input, grad_weight, grad_bias);
  const Tensor workspace = new_workspace(cpu::workspace_floats(problem), input);
  cpu::backward(
      problem, pointers(grad_output, input, weight, grad_input, grad_weight, grad_bias, workspace));
}

}  // namespace
}  // namespace vfmk::dynamic_conv2d

STABLE_TORCH_LIBRARY_FRAGMENT(vfmk_native, m) {
  m.def(
      "dynamic_conv2d_forward(Tensor input, Tensor weight, Tensor? bias, int[] padding, "
      "int[] dilation, Tensor(a!) output) -> ()");
  m.def(
      "dynamic_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, "
      "int[] padding, int[] dilation, Tensor(a!)? grad_input, Tensor(b!)? grad_weight, "
      "Tensor(c!)? grad_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vfmk_native, CPU, m) {
  using namespace vfmk::dynamic_conv2d;
  m.impl("dynamic_conv2d_forward", TORCH_BOX(&forward_cpu));
  m.impl("dynamic_conv2d_backward", TORCH_BOX(&backward_cpu));
}
