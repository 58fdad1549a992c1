// The PyTorch boundary of the attention with relative position: tensors become the plain data of
// the header. vfmk/ops has checked every argument and allocated every output. There are CPU kernels
// alone: Triton serves GPUs.
#include "rel_pos_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "library.h"

namespace vfmk::rel_pos_attention {

namespace cpu {

// The kernels of cpu/rel_pos_attention.cpp, compiled once for each instruction set.
#define VFMK_DECLARE(isa)                                           \
  namespace isa {                                                   \
  int64_t forward_workspace_floats(const Problem& problem);         \
  int64_t backward_workspace_floats(const Problem& problem);        \
  void forward(const Problem& problem, const Forward& arguments);   \
  void backward(const Problem& problem, const Backward& arguments); \
  }
VFMK_DECLARE(baseline)
#if defined(__x86_64__)
VFMK_DECLARE(avx2)
VFMK_DECLARE(avx512)
#define VFMK_DISPATCH(call)  \
  switch (cpu_isa()) {       \
    case CpuIsa::avx512:     \
      return avx512::call;   \
    case CpuIsa::avx2:       \
      return avx2::call;     \
    case CpuIsa::baseline:   \
      return baseline::call; \
  }                          \
  return baseline::call
#else
#define VFMK_DISPATCH(call) return baseline::call
#endif

int64_t forward_workspace_floats(const Problem& problem) {
  VFMK_DISPATCH(forward_workspace_floats(problem));
}

int64_t backward_workspace_floats(const Problem& problem) {
  VFMK_DISPATCH(backward_workspace_floats(problem));
}

void forward(const Problem& problem, const Forward& arguments) {
  VFMK_DISPATCH(forward(problem, arguments));
}

void backward(const Problem& problem, const Backward& arguments) {
  VFMK_DISPATCH(backward(problem, arguments));
}

}  // namespace cpu

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      STD_TORCH_CHECK(false, "rel_pos_attention: unsupported dtype");
  }
}

Strides strides(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}
Strides strides(const MaybeTensor& tensor) { return tensor ? strides(*tensor) : Strides{}; }

const void* data(const MaybeTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
void* mutable_data(const MaybeTensor& tensor) {
  return tensor && tensor->numel() > 0 ? tensor->mutable_data_ptr() : nullptr;
}

Problem describe(const Tensor& query, const Tensor& key, const Tensor& value,
                 const Tensor& relative, const Tensor& output, const Sizes& window_size,
                 double scale) {
  Problem problem{};
  problem.dtype = dtype_of(query);
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

Tensor new_workspace(int64_t floats, const Tensor& like) {
  return torch::stable::empty({floats}, ScalarType::Float, std::nullopt, like.device());
}

void forward_cpu(Tensor query, Tensor key, Tensor value, Tensor relative, MaybeTensor pad_key,
                 MaybeTensor pad_value, Sizes window_size, double scale, Tensor output,
                 Tensor logsumexp) {
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
