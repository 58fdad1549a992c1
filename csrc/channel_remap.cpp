// The PyTorch boundary of channel_remap: tensors become the plain data of the header.
// vfmk/ops/channel_remap.py has checked every argument and allocated every output.
#include "channel_remap.h"

#include <torch/csrc/stable/library.h>

#include "boundary.h"

namespace vfmk::channel_remap {

namespace cpu {

// The kernels of cpu/channel_remap.cpp, compiled once for each instruction set.
#define VFMK_DECLARE(isa)                                           \
  namespace isa {                                                   \
  int64_t workspace_words(const Problem& problem);                  \
  void forward(const Problem& problem, const Forward& arguments);   \
  void backward(const Problem& problem, const Backward& arguments); \
  }
VFMK_DECLARE(baseline)
VFMK_DECLARE(avx2)
VFMK_DECLARE(avx512)

int64_t workspace_words(const Problem& problem) { VFMK_DISPATCH(workspace_words(problem)); }

void forward(const Problem& problem, const Forward& arguments) {
  VFMK_DISPATCH(forward(problem, arguments));
}

void backward(const Problem& problem, const Backward& arguments) {
  VFMK_DISPATCH(backward(problem, arguments));
}

}  // namespace cpu

namespace {

constexpr const char* NAME = "channel_remap";

// `output` is the output or grad_output, both [N,C',rows,columns]; `index` is [maps,C'].
Problem describe(const Tensor& output, const Tensor& index, int64_t input_channels,
                 bool channels_last) {
  Problem problem{};
  problem.dtype = dtype_of(output, NAME);
  problem.channels_last = channels_last;
  problem.maps = index.size(0);
  problem.samples = problem.maps > 0 ? output.size(0) / problem.maps : 0;
  problem.input_channels = input_channels;
  problem.output_channels = output.size(1);
  problem.rows = output.size(2);
  problem.columns = output.size(3);
  problem.output = strides(output);
  return problem;
}

Problem describe_forward(const Tensor& input, const Tensor& index, const MaybeTensor& scale,
                         bool channels_last, const Tensor& output) {
  check_arguments(NAME, output.scalar_type(),
                  {{"input", input, activation_layout(channels_last)},
                   {"scale", scale, Layout::contiguous},
                   {"output", output, Layout::packed}});
  check_arguments(NAME, ScalarType::Long, {{"index", index, Layout::contiguous}});
  Problem problem = describe(output, index, input.size(1), channels_last);
  problem.input = strides(input);
  merge_rows(problem, {&problem.input, &problem.output});
  return problem;
}

Problem describe_backward(const Tensor& grad_output, const MaybeTensor& input, const Tensor& index,
                          const MaybeTensor& scale, int64_t input_channels, bool channels_last,
                          const MaybeTensor& grad_input, const MaybeTensor& grad_scale) {
  check_arguments(NAME, grad_output.scalar_type(),
                  {{"grad_output", grad_output, Layout::packed},
                   {"input", input, activation_layout(channels_last)},
                   {"scale", scale, Layout::contiguous},
                   {"grad_input", grad_input, Layout::packed},
                   {"grad_scale", grad_scale, Layout::contiguous}});
  check_arguments(NAME, ScalarType::Long, {{"index", index, Layout::contiguous}});
  Problem problem = describe(grad_output, index, input_channels, channels_last);
  problem.input = strides(input.value_or(grad_output));  // in place of none, what merges alike
  problem.grad_input = strides(grad_input.value_or(grad_output));
  merge_rows(problem, {&problem.output, &problem.input, &problem.grad_input});
  return problem;
}

Backward pointers(const Tensor& grad_output, const MaybeTensor& input, const Tensor& index,
                  const MaybeTensor& scale, const MaybeTensor& grad_input,
                  const MaybeTensor& grad_scale, const Tensor& workspace) {
  return {grad_output.const_data_ptr(),
          data(input),
          positions(index),
          data(scale),
          mutable_data(grad_input),
          mutable_data(grad_scale),
          workspace.mutable_data_ptr()};
}

void forward_cpu(Tensor input, Tensor index, MaybeTensor scale, bool channels_last, Tensor output) {
  const Problem problem = describe_forward(input, index, scale, channels_last, output);
  check_range(NAME, index, problem.input_channels);
  cpu::forward(problem,
               {input.const_data_ptr(), positions(index), data(scale), output.mutable_data_ptr()});
}

void backward_cpu(Tensor grad_output, MaybeTensor input, Tensor index, MaybeTensor scale,
                  int64_t input_channels, bool channels_last, MaybeTensor grad_input,
                  MaybeTensor grad_scale) {
  const Problem problem = describe_backward(grad_output, input, index, scale, input_channels,
                                            channels_last, grad_input, grad_scale);
  const Tensor workspace = new_workspace(cpu::workspace_words(problem), grad_output);
  cpu::backward(problem,
                pointers(grad_output, input, index, scale, grad_input, grad_scale, workspace));
}

#if defined(VFMK_WITH_CUDA)

void forward_cuda(Tensor input, Tensor index, MaybeTensor scale, bool channels_last,
                  Tensor output) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Problem problem = describe_forward(input, index, scale, channels_last, output);
  check_launch(NAME, cuda::forward(problem,
                                   {input.const_data_ptr(), positions(index), data(scale),
                                    output.mutable_data_ptr()},
                                   current_stream(input, NAME)));
}

void backward_cuda(Tensor grad_output, MaybeTensor input, Tensor index, MaybeTensor scale,
                   int64_t input_channels, bool channels_last, MaybeTensor grad_input,
                   MaybeTensor grad_scale) {
  const torch::stable::accelerator::DeviceGuard guard(grad_output.get_device_index());
  const Problem problem = describe_backward(grad_output, input, index, scale, input_channels,
                                            channels_last, grad_input, grad_scale);
  const Tensor workspace = new_workspace(cuda::workspace_words(problem), grad_output);
  check_launch(NAME, cuda::backward(problem,
                                    pointers(grad_output, input, index, scale, grad_input,
                                             grad_scale, workspace),
                                    current_stream(grad_output, NAME)));
}

#endif

}  // namespace
}  // namespace vfmk::channel_remap

STABLE_TORCH_LIBRARY_FRAGMENT(vfmk_native, m) {
  m.def(
      "channel_remap_forward(Tensor input, Tensor index, Tensor? scale, bool channels_last, "
      "Tensor(a!) output) -> ()");
  m.def(
      "channel_remap_backward(Tensor grad_output, Tensor? input, Tensor index, Tensor? scale, "
      "int input_channels, bool channels_last, Tensor(a!)? grad_input, Tensor(b!)? grad_scale) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vfmk_native, CPU, m) {
  using namespace vfmk::channel_remap;
  m.impl("channel_remap_forward", TORCH_BOX(&forward_cpu));
  m.impl("channel_remap_backward", TORCH_BOX(&backward_cpu));
}

#if defined(VFMK_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(vfmk_native, CUDA, m) {
  using namespace vfmk::channel_remap;
  m.impl("channel_remap_forward", TORCH_BOX(&forward_cuda));
  m.impl("channel_remap_backward", TORCH_BOX(&backward_cuda));
}
#endif
