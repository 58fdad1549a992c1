// The PyTorch boundary of attention_pool: tensors become the plain data of the header.
// vfmk/ops/attention_pool.py has checked every argument and allocated every output. There are CPU
// kernels alone: Triton serves GPUs.
#include "attention_pool.h"

#include <torch/csrc/stable/library.h>

#include "boundary.h"

namespace vfmk::attention_pool {

namespace cpu {

// The kernels of cpu/attention_pool.cpp, compiled once for each instruction set.
VFMK_DECLARE_AND_DISPATCH

}  // namespace cpu

namespace {

constexpr const char* NAME = "attention_pool";

Problem describe(const Tensor& tokens, const Tensor& queries, double scale) {
  Problem problem{};
  problem.dtype = dtype_of(tokens, NAME);
  problem.batch = tokens.size(0);
  problem.tokens = tokens.size(1);
  problem.width = tokens.size(2);
  problem.queries = queries.size(0);
  problem.scale = static_cast<float>(scale);
  problem.token = {tokens.stride(0), tokens.stride(1)};
  return problem;
}

void forward_cpu(Tensor tokens, Tensor queries, double scale, Tensor output, Tensor log_sum_exp) {
  check_arguments(NAME, tokens.scalar_type(),
                  {{"tokens", tokens, Layout::dense_last},
                   {"queries", queries, Layout::contiguous},
                   {"output", output, Layout::contiguous}});
  check_arguments(NAME, ScalarType::Float, {{"log_sum_exp", log_sum_exp, Layout::contiguous}});
  const Problem problem = describe(tokens, queries, scale);
  const Tensor workspace = new_workspace(cpu::forward_workspace_floats(problem), tokens);
  cpu::forward(problem,
               {tokens.const_data_ptr(), queries.const_data_ptr(), output.mutable_data_ptr(),
                static_cast<float*>(log_sum_exp.mutable_data_ptr()),
                static_cast<float*>(workspace.mutable_data_ptr())});
}

void backward_cpu(Tensor grad_output, Tensor tokens, Tensor queries, Tensor output,
                  Tensor log_sum_exp, double scale, MaybeTensor grad_tokens,
                  MaybeTensor grad_queries) {
  check_arguments(NAME, tokens.scalar_type(),
                  {{"grad_output", grad_output, Layout::dense_last},
                   {"tokens", tokens, Layout::dense_last},
                   {"queries", queries, Layout::contiguous},
                   {"output", output, Layout::contiguous},
                   {"grad_tokens", grad_tokens, Layout::contiguous},
                   {"grad_queries", grad_queries, Layout::contiguous}});
  check_arguments(NAME, ScalarType::Float, {{"log_sum_exp", log_sum_exp, Layout::contiguous}});
  Problem problem = describe(tokens, queries, scale);
  problem.grad_output = {grad_output.stride(0), grad_output.stride(1)};
  const Tensor workspace = new_workspace(cpu::backward_workspace_floats(problem), tokens);
  cpu::backward(problem,
                {grad_output.const_data_ptr(), tokens.const_data_ptr(), queries.const_data_ptr(),
                 output.const_data_ptr(), static_cast<const float*>(log_sum_exp.const_data_ptr()),
                 mutable_data(grad_tokens), mutable_data(grad_queries),
                 static_cast<float*>(workspace.mutable_data_ptr())});
}

}  // namespace
}  // namespace vfmk::attention_pool

STABLE_TORCH_LIBRARY_FRAGMENT(vfmk_native, m) {
  m.def(
      "attention_pool_forward(Tensor tokens, Tensor queries, float scale, Tensor(a!) output, "
      "Tensor(b!) log_sum_exp) -> ()");
  m.def(
      "attention_pool_backward(Tensor grad_output, Tensor tokens, Tensor queries, Tensor output, "
      "Tensor log_sum_exp, float scale, Tensor(a!)? grad_tokens, Tensor(b!)? grad_queries) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vfmk_native, CPU, m) {
  using namespace vfmk::attention_pool;
  m.impl("attention_pool_forward", TORCH_BOX(&forward_cpu));
  m.impl("attention_pool_backward", TORCH_BOX(&backward_cpu));
}
