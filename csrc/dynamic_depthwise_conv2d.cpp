// The PyTorch boundary of dynamic_depthwise_conv2d: tensors become the plain data of the header.
// vfmk/ops/dynamic_depthwise_conv2d.py has checked every argument and allocated every output.
#include "dynamic_depthwise_conv2d.h"

#include <torch/csrc/stable/library.h>

#include "convolution_boundary.h"

namespace vfmk::dynamic_depthwise_conv2d {

namespace cpu {
VFMK_DECLARE_AND_DISPATCH_CONVOLUTION
}  // namespace cpu

namespace {

constexpr const char* NAME = "dynamic_depthwise_conv2d";

using namespace convolution;

void forward_cpu(Tensor input, Tensor weight, MaybeTensor bias, Sizes padding, Sizes dilation,
                 Tensor output) {
  const Problem problem = describe_forward(NAME, input, weight, bias, padding, dilation, output);
  cpu::forward(problem, input.const_data_ptr(), weight.const_data_ptr(), data(bias),
               output.mutable_data_ptr());
}

void backward_cpu(Tensor grad_output, Tensor input, Tensor weight, Sizes padding, Sizes dilation,
                  MaybeTensor grad_input, MaybeTensor grad_weight, MaybeTensor grad_bias) {
  const Problem problem = describe_backward(NAME, grad_output, input, weight, padding, dilation,
                                            grad_input, grad_weight, grad_bias);
  const Tensor workspace = new_workspace(cpu::workspace_floats(problem), input);
  cpu::backward(
      problem, pointers(grad_output, input, weight, grad_input, grad_weight, grad_bias, workspace));
}

#if defined(VFMK_WITH_CUDA)

void forward_cuda(Tensor input, Tensor weight, MaybeTensor bias, Sizes padding, Sizes dilation,
                  Tensor output) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Problem problem = describe_forward(NAME, input, weight, bias, padding, dilation, output);
  check_launch(NAME,
               cuda::forward(problem, input.const_data_ptr(), weight.const_data_ptr(), data(bias),
                             output.mutable_data_ptr(), current_stream(input, NAME)));
}

void backward_cuda(Tensor grad_output, Tensor input, Tensor weight, Sizes padding, Sizes dilation,
                   MaybeTensor grad_input, MaybeTensor grad_weight, MaybeTensor grad_bias) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Problem problem = describe_backward(NAME, grad_output, input, weight, padding, dilation,
                                            grad_input, grad_weight, grad_bias);
  const Tensor workspace = new_workspace(cuda::workspace_floats(problem), input);
  check_launch(NAME, cuda::backward(problem,
                                    pointers(grad_output, input, weight, grad_input, grad_weight,
                                             grad_bias, workspace),
                                    current_stream(input, NAME)));
}

#endif

}  // namespace
}  // namespace vfmk::dynamic_depthwise_conv2d

STABLE_TORCH_LIBRARY_FRAGMENT(vfmk_native, m) {
  m.def(
      "dynamic_depthwise_conv2d_forward(Tensor input, Tensor weight, Tensor? bias, int[] padding, "
      "int[] dilation, Tensor(a!) output) -> ()");
  m.def(
      "dynamic_depthwise_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, "
      "int[] padding, int[] dilation, Tensor(a!)? grad_input, Tensor(b!)? grad_weight, "
      "Tensor(c!)? grad_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vfmk_native, CPU, m) {
  using namespace vfmk::dynamic_depthwise_conv2d;
  m.impl("dynamic_depthwise_conv2d_forward", TORCH_BOX(&forward_cpu));
  m.impl("dynamic_depthwise_conv2d_backward", TORCH_BOX(&backward_cpu));
}

#if defined(VFMK_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(vfmk_native, CUDA, m) {
  using namespace vfmk::dynamic_depthwise_conv2d;
  m.impl("dynamic_depthwise_conv2d_forward", TORCH_BOX(&forward_cuda));
  m.impl("dynamic_depthwise_conv2d_backward", TORCH_BOX(&backward_cuda));
}
#endif
