// The PyTorch boundary of the attention with relative position: tensors become the plain data of
// the header. vfmk/ops has checked every argument and allocated every output. There are CPU kernels
// alone: Triton serves GPUs.
#include "rel_pos_attention.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "boundary.h"

namespace vfmk::rel_pos_attention {

namespace cpu {

// The kernels of cpu/rel_pos_attention.cpp, compiled once for each instruction set.
VFMK_DECLARE_AND_DISPATCH

}  // namespace cpu

namespace {

constexpr const char* NAME = "rel_pos_attention";

using Sizes = std::vector<int64_t>;

Strides strides(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}
Strides strides(const MaybeTensor& tensor) { return tensor ? strides(*tensor) : Strides{}; }

Problem describe(const Tensor& query, const Tensor& key, const Tensor& value,
                 const Tensor& relative, const Tensor& output, const Sizes& window_size,
                 double scale) {
  Problem problem{};
  problem.dtype = dtype_of(query, NAME);
  problem.batch = query.size(0);
  problem.height = static_cast<int32_t>(query.size(1));
  problem.width = static_cast<int32_t>(query.size(2));
  problem.heads = query.size(3);
  problem.head_width = static_cast<int32_t>(query.size(4));
  problem.window_height = static_cast<int32_t>(window_size[0]);
  problem.window_width = static_cast<int32_t>(window_size[1]);
  problem.scale = static_cast<float>(scale);
  problem.has_padding =
      problem.height % problem.window_height != 0 || problem.width % problem.window_width != 0;
  problem.query = strides(query);
  problem.key = strides(key);
  problem.value = strides(value);
  problem.relative = strides(relative);
  problem.output = strides(output);
  return problem;
}

void forward_cpu(Tensor query, Tensor key, Tensor value, Tensor relative, MaybeTensor pad_key,
                 MaybeTensor pad_value, Sizes window_size, double scale, Tensor output,
                 Tensor logsumexp) {
  check_arguments(NAME, query.scalar_type(),
                  {{"query", query, Layout::dense_last},
                   {"key", key, Layout::dense_last},
                   {"value", value, Layout::dense_last},
                   {"relative", relative, Layout::dense_last},
                   {"pad_key", pad_key, Layout::contiguous},
                   {"pad_value", pad_value, Layout::contiguous},
                   {"output", output, Layout::dense_last}});
  check_arguments(NAME, ScalarType::Float, {{"logsumexp", logsumexp, Layout::contiguous}});
  const Problem problem = describe(query, key, value, relative, output, window_size, scale);
  const Tensor workspace = new_workspace(cpu::forward_workspace_floats(problem), query);
  cpu::forward(problem,
               {query.const_data_ptr(), key.const_data_ptr(), value.const_data_ptr(),
                relative.const_data_ptr(), data(pad_key), data(pad_value),
                output.mutable_data_ptr(), static_cast<float*>(logsumexp.mutable_data_ptr()),
                static_cast<float*>(workspace.mutable_data_ptr())});
}

void backward_cpu(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor relative,
                  MaybeTensor pad_key, MaybeTensor pad_value, Tensor output, Tensor logsumexp,
                  Sizes window_size, double scale, MaybeTensor grad_query, MaybeTensor grad_key,
                  MaybeTensor grad_value, MaybeTensor grad_relative, MaybeTensor grad_pad_key,
                  MaybeTensor grad_pad_value) {
  check_arguments(NAME, query.scalar_type(),
                  {{"grad_output", grad_output, Layout::dense_last},
                   {"query", query, Layout::dense_last},
                   {"key", key, Layout::dense_last},
                   {"value", value, Layout::dense_last},
                   {"relative", relative, Layout::dense_last},
                   {"pad_key", pad_key, Layout::contiguous},
                   {"pad_value", pad_value, Layout::contiguous},
                   {"output", output, Layout::dense_last},
                   {"grad_query", grad_query, Layout::dense_last},
                   {"grad_key", grad_key, Layout::dense_last},
                   {"grad_value", grad_value, Layout::dense_last},
                   {"grad_relative", grad_relative, Layout::dense_last},
                   {"grad_pad_key", grad_pad_key, Layout::contiguous},
                   {"grad_pad_value", grad_pad_value, Layout::contiguous}});
  check_arguments(NAME, ScalarType::Float, {{"logsumexp", logsumexp, Layout::contiguous}});
  Problem problem = describe(query, key, value, relative, output, window_size, scale);
  problem.grad_output = strides(grad_output);
  problem.grad_query = strides(grad_query);
  problem.grad_key = strides(grad_key);
  problem.grad_value = strides(grad_value);
  problem.grad_relative = strides(grad_relative);
  const Tensor workspace = new_workspace(cpu::backward_workspace_floats(problem), query);
  cpu::backward(problem,
                {grad_output.const_data_ptr(), query.const_data_ptr(), key.const_data_ptr(),
                 value.const_data_ptr(), relative.const_data_ptr(), data(pad_key), data(pad_value),
                 output.const_data_ptr(), static_cast<const float*>(logsumexp.const_data_ptr()),
                 mutable_data(grad_query), mutable_data(grad_key), mutable_data(grad_value),
                 mutable_data(grad_relative), mutable_data(grad_pad_key),
                 mutable_data(grad_pad_value), static_cast<float*>(workspace.mutable_data_ptr())});
}

}  // namespace
}  // namespace vfmk::rel_pos_attention

STABLE_TORCH_LIBRARY_FRAGMENT(vfmk_native, m) {
  m.def(
      "rel_pos_attention_forward(Tensor query, Tensor key, Tensor value, Tensor relative, "
      "Tensor? pad_key, Tensor? pad_value, int[] window_size, float scale, Tensor(a!) output, "
      "Tensor(b!) logsumexp) -> ()");
  m.def(
      "rel_pos_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, "
      "Tensor relative, Tensor? pad_key, Tensor? pad_value, Tensor output, Tensor logsumexp, "
      "int[] window_size, float scale, Tensor(a!)? grad_query, Tensor(b!)? grad_key, "
      "Tensor(c!)? grad_value, Tensor(d!)? grad_relative, Tensor(e!)? grad_pad_key, "
      "Tensor(f!)? grad_pad_value) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vfmk_native, CPU, m) {
  using namespace vfmk::rel_pos_attention;
  m.impl("rel_pos_attention_forward", TORCH_BOX(&forward_cpu));
  m.impl("rel_pos_attention_backward", TORCH_BOX(&backward_cpu));
}
