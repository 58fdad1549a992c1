// The PyTorch boundary of adapter_attention: tensors become the plain data of the header.
// vfmk/ops/adapter_attention.py has checked every argument and allocated every output. There are
// CPU kernels alone: Triton serves GPUs.
#include "adapter_attention.h"

#include <torch/csrc/stable/library.h>

#include "boundary.h"

namespace vfmk::adapter_attention {

namespace cpu {

// The kernels of cpu/adapter_attention.cpp, compiled once for each instruction set.
VFMK_DECLARE_AND_DISPATCH

}  // namespace cpu

namespace {

constexpr const char* NAME = "adapter_attention";

Problem describe(const Tensor& input, int64_t num_heads, double scale) {
  Problem problem{};
  problem.dtype = dtype_of(input, NAME);
  problem.batch = input.size(0);
  problem.tokens = input.size(1);
  problem.rank = input.size(2);
  problem.heads = num_heads;
  problem.scale = static_cast<float>(scale);
  problem.input = {input.stride(0), input.stride(1)};
  return problem;
}

void forward_cpu(Tensor input, Tensor qkv_weight, Tensor qkv_bias, int64_t num_heads, double scale,
                 Tensor output, Tensor log_sum_exp) {
  check_arguments(NAME, input.scalar_type(),
                  {{"input", input, Layout::dense_last},
                   {"qkv_weight", qkv_weight, Layout::contiguous},
                   {"qkv_bias", qkv_bias, Layout::contiguous},
                   {"output", output, Layout::contiguous}});
  check_arguments(NAME, ScalarType::Float, {{"log_sum_exp", log_sum_exp, Layout::contiguous}});
  const Problem problem = describe(input, num_heads, scale);
  const Tensor workspace = new_workspace(cpu::forward_workspace_floats(problem), input);
  cpu::forward(problem,
               {input.const_data_ptr(), qkv_weight.const_data_ptr(), qkv_bias.const_data_ptr(),
                output.mutable_data_ptr(), static_cast<float*>(log_sum_exp.mutable_data_ptr()),
                static_cast<float*>(workspace.mutable_data_ptr())});
}

void backward_cpu(Tensor grad_output, Tensor input, Tensor qkv_weight, Tensor qkv_bias,
                  Tensor output, Tensor log_sum_exp, int64_t num_heads, double scale,
                  MaybeTensor grad_input, MaybeTensor grad_weight, MaybeTensor grad_bias) {
  check_arguments(NAME, input.scalar_type(),
                  {{"grad_output", grad_output, Layout::dense_last},
                   {"input", input, Layout::dense_last},
                   {"qkv_weight", qkv_weight, Layout::contiguous},
                   {"qkv_bias", qkv_bias, Layout::contiguous},
                   {"output", output, Layout::contiguous},
                   {"grad_input", grad_input, Layout::contiguous},
                   {"grad_weight", grad_weight, Layout::contiguous},
                   {"grad_bias", grad_bias, Layout::contiguous}});
  check_arguments(NAME, ScalarType::Float, {{"log_sum_exp", log_sum_exp, Layout::contiguous}});
  Problem problem = describe(input, num_heads, scale);
  problem.grad_output = {grad_output.stride(0), grad_output.stride(1)};
  const Tensor workspace = new_workspace(cpu::backward_workspace_floats(problem), input);
  cpu::backward(problem,
                {grad_output.const_data_ptr(), input.const_data_ptr(), qkv_weight.const_data_ptr(),
                 qkv_bias.const_data_ptr(), output.const_data_ptr(),
                 static_cast<const float*>(log_sum_exp.const_data_ptr()), mutable_data(grad_input),
                 mutable_data(grad_weight), mutable_data(grad_bias),
                 static_cast<float*>(workspace.mutable_data_ptr())});
}

}  // namespace
}  // namespace vfmk::adapter_attention

STABLE_TORCH_LIBRARY_FRAGMENT(vfmk_native, m) {
  m.def(
      "adapter_attention_forward(Tensor input, Tensor qkv_weight, Tensor qkv_bias, int num_heads, "
      "float scale, Tensor(a!) output, Tensor(b!) log_sum_exp) -> ()");
  m.def(
      "adapter_attention_backward(Tensor grad_output, Tensor input, Tensor qkv_weight, "
      "Tensor qkv_bias, Tensor output, Tensor log_sum_exp, int num_heads, float scale, "
      "Tensor(a!)? grad_input, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vfmk_native, CPU, m) {
  using namespace vfmk::adapter_attention;
  m.impl("adapter_attention_forward", TORCH_BOX(&forward_cpu));
  m.impl("adapter_attention_backward", TORCH_BOX(&backward_cpu));
}
