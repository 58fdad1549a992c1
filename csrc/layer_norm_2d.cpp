// The PyTorch boundary of layer_norm_2d: tensors become the plain data of the header.
// vfmk/ops/layer_norm_2d.py has checked every argument and allocated every output. There are CPU
// kernels alone: Triton serves GPUs.
#include "layer_norm_2d.h"

#include <torch/csrc/stable/library.h>

#include "boundary.h"

namespace vfmk::layer_norm_2d {

namespace cpu {

// The kernels of cpu/layer_norm_2d.cpp, compiled once for each instruction set.
VFMK_DECLARE_AND_DISPATCH

}  // namespace cpu

namespace {

constexpr const char* NAME = "layer_norm_2d";

// `output` is the output or grad_output.
Problem describe(const Tensor& input, const Tensor& output, bool channels_last) {
  Problem problem{};
  problem.dtype = dtype_of(input, NAME);
  problem.channels_last = channels_last;
  problem.batch = output.size(0);
  problem.input_channels = input.size(1);
  problem.output_channels = output.size(1);
  problem.rows = output.size(2);
  problem.columns = output.size(3);
  problem.input = strides(input);
  problem.output = strides(output);
  return problem;
}

void forward_cpu(Tensor input, Tensor weight, Tensor bias, MaybeTensor index, double eps,
                 bool channels_last, Tensor output, Tensor mean, Tensor rstd) {
  check_arguments(NAME, input.scalar_type(),
                  {{"input", input, activation_layout(channels_last)},
                   {"weight", weight, Layout::contiguous},
                   {"bias", bias, Layout::contiguous},
                   {"output", output, Layout::packed}});
  check_arguments(NAME, ScalarType::Long, {{"index", index, Layout::contiguous}});
  check_arguments(NAME, ScalarType::Float,
                  {{"mean", mean, Layout::contiguous}, {"rstd", rstd, Layout::contiguous}});
  Problem problem = describe(input, output, channels_last);
  problem.eps = static_cast<float>(eps);
  merge_rows(problem, {&problem.input, &problem.output});
  if (index) check_range(NAME, *index, problem.input_channels);
  const Tensor workspace = new_workspace(cpu::forward_workspace_floats(problem), input);
  cpu::forward(problem, {input.const_data_ptr(), weight.const_data_ptr(), bias.const_data_ptr(),
                         positions(index), output.mutable_data_ptr(),
                         static_cast<float*>(mean.mutable_data_ptr()),
                         static_cast<float*>(rstd.mutable_data_ptr()),
                         static_cast<float*>(workspace.mutable_data_ptr())});
}

void backward_cpu(Tensor grad_output, Tensor input, Tensor weight, MaybeTensor index, Tensor mean,
                  Tensor rstd, bool channels_last, MaybeTensor grad_input, MaybeTensor grad_weight,
                  MaybeTensor grad_bias) {
  check_arguments(NAME, input.scalar_type(),
                  {{"grad_output", grad_output, Layout::packed},
                   {"input", input, activation_layout(channels_last)},
                   {"weight", weight, Layout::contiguous},
                   {"grad_input", grad_input, Layout::packed},
                   {"grad_weight", grad_weight, Layout::contiguous},
                   {"grad_bias", grad_bias, Layout::contiguous}});
  check_arguments(NAME, ScalarType::Long, {{"index", index, Layout::contiguous}});
  check_arguments(NAME, ScalarType::Float,
                  {{"mean", mean, Layout::contiguous}, {"rstd", rstd, Layout::contiguous}});
  Problem problem = describe(input, grad_output, channels_last);
  problem.grad_input = strides(grad_input.value_or(grad_output));  // in place of none, one like it
  merge_rows(problem, {&problem.output, &problem.input, &problem.grad_input});
  const Tensor workspace = new_workspace(cpu::backward_workspace_floats(problem), input);
  cpu::backward(problem,
                {grad_output.const_data_ptr(), input.const_data_ptr(), weight.const_data_ptr(),
                 positions(index), static_cast<const float*>(mean.const_data_ptr()),
                 static_cast<const float*>(rstd.const_data_ptr()), mutable_data(grad_input),
                 mutable_data(grad_weight), mutable_data(grad_bias),
                 static_cast<float*>(workspace.mutable_data_ptr())});
}

}  // namespace
}  // namespace vfmk::layer_norm_2d

STABLE_TORCH_LIBRARY_FRAGMENT(vfmk_native, m) {
  m.def(
      "layer_norm_2d_forward(Tensor input, Tensor weight, Tensor bias, Tensor? index, float eps, "
      "bool channels_last, Tensor(a!) output, Tensor(b!) mean, Tensor(c!) rstd) -> ()");
  m.def(
      "layer_norm_2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? index, "
      "Tensor mean, Tensor rstd, bool channels_last, Tensor(a!)? grad_input, "
      "Tensor(b!)? grad_weight, Tensor(c!)? grad_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vfmk_native, CPU, m) {
  using namespace vfmk::layer_norm_2d;
  m.impl("layer_norm_2d_forward", TORCH_BOX(&forward_cpu));
  m.impl("layer_norm_2d_backward", TORCH_BOX(&backward_cpu));
}
