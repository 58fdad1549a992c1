// The PyTorch boundary of channel_remap: tensors become the plain data of the header. For `forward`
// and `backward` vfmk/ops/channel_remap.py has checked every argument, allocated every output and
// viewed them as planes; `at_once` and `gradients_at_once` do so themselves, by the same rules.
#include "channel_remap.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

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

// [N,C,rows,columns] of an activation.
struct Planes {
  int64_t samples, channels, rows, columns;
  Strides strides;
};

Planes planes(const Tensor& tensor) {
  return {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3), strides(tensor)};
}

// `output` is the output or grad_output.
Problem describe(DType dtype, const Planes& output, int64_t maps, int64_t input_channels,
                 bool channels_last) {
  Problem problem{};
  problem.dtype = dtype;
  problem.channels_last = channels_last;
  problem.maps = maps;
  problem.samples = maps > 0 ? output.samples / maps : 0;
  problem.input_channels = input_channels;
  problem.output_channels = output.channels;
  problem.rows = output.rows;
  problem.columns = output.columns;
  problem.output = output.strides;
  return problem;
}

Problem with_input(Problem problem, const Strides& input) {
  problem.input = input;
  merge_rows(problem, {&problem.input, &problem.output});
  return problem;
}

Problem with_gradients(Problem problem, const Strides& input, const Strides& grad_input) {
  problem.input = input;
  problem.grad_input = grad_input;
  merge_rows(problem, {&problem.output, &problem.input, &problem.grad_input});
  return problem;
}

Problem describe_forward(const Tensor& input, const Tensor& index, const MaybeTensor& scale,
                         bool channels_last, const Tensor& output) {
  check_arguments(NAME, output.scalar_type(),
                  {{"input", input, activation_layout(channels_last)},
                   {"scale", scale, Layout::contiguous},
                   {"output", output, Layout::packed}});
  check_arguments(NAME, ScalarType::Long, {{"index", index, Layout::contiguous}});
  return with_input(
      describe(dtype_of(output, NAME), planes(output), index.size(0), input.size(1), channels_last),
      strides(input));
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
  return with_gradients(describe(dtype_of(grad_output, NAME), planes(grad_output), index.size(0),
                                 input_channels, channels_last),
                        strides(input.value_or(grad_output)),  // for none, what merges alike
                        strides(grad_input.value_or(grad_output)));
}

// What the two devices do differently.
using Launch = void(const Problem&, const Forward&, const Tensor& input, const Tensor& index);
using LaunchBackward = void(const Problem&, Backward, const Tensor& grad_output,
                            const Tensor& index);

void launch_cpu(const Problem& problem, const Forward& arguments, const Tensor&,
                const Tensor& index) {
  check_range(NAME, index, problem.input_channels);
  cpu::forward(problem, arguments);
}

void launch_backward_cpu(const Problem& problem, Backward arguments, const Tensor& grad_output,
                         const Tensor& index) {
  check_range(NAME, index, problem.input_channels);
  const Tensor workspace = new_workspace(cpu::workspace_words(problem), grad_output);
  arguments.workspace = workspace.mutable_data_ptr();
  cpu::backward(problem, arguments);
}

#if defined(VFMK_WITH_CUDA)

void launch_cuda(const Problem& problem, const Forward& arguments, const Tensor& input,
                 const Tensor&) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  check_launch(NAME, cuda::forward(problem, arguments, current_stream(input, NAME)));
}

void launch_backward_cuda(const Problem& problem, Backward arguments, const Tensor& grad_output,
                          const Tensor&) {
  const torch::stable::accelerator::DeviceGuard guard(grad_output.get_device_index());
  const Tensor workspace = new_workspace(cuda::workspace_words(problem), grad_output);
  arguments.workspace = workspace.mutable_data_ptr();
  check_launch(NAME, cuda::backward(problem, arguments, current_stream(grad_output, NAME)));
}

#endif

template <Launch launch>
void forward(Tensor input, Tensor index, MaybeTensor scale, bool channels_last, Tensor output) {
  launch(describe_forward(input, index, scale, channels_last, output),
         {input.const_data_ptr(), positions(index), data(scale), output.mutable_data_ptr()}, input,
         index);
}

template <LaunchBackward launch>
void backward(Tensor grad_output, MaybeTensor input, Tensor index, MaybeTensor scale,
              int64_t input_channels, bool channels_last, MaybeTensor grad_input,
              MaybeTensor grad_scale) {
  launch(describe_backward(grad_output, input, index, scale, input_channels, channels_last,
                           grad_input, grad_scale),
         {grad_output.const_data_ptr(), data(input), positions(index), data(scale),
          mutable_data(grad_input), mutable_data(grad_scale), nullptr},
         grad_output, index);
}

// The same on tensors as the user has them, checked and allocated here. Where one is not as these
// kernels read it, or is wrong, there is no result: Python then copies it, or says what is wrong.

bool on_the_same_device(const Tensor& one, const Tensor& other) {
  return one.is_cpu() == other.is_cpu() && one.get_device_index() == other.get_device_index();
}

bool is_dtype_of_kernels(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

bool is_like(const Tensor& tensor, ScalarType dtype, const Tensor& other) {
  return tensor.scalar_type() == dtype && on_the_same_device(tensor, other);
}

// Each other, and an activation with its channels in dimension `dim`.
bool index_and_scale_fit(const Tensor& activation, const Tensor& index, const MaybeTensor& scale,
                         int64_t dim) {
  if (!is_like(index, ScalarType::Long, activation) || !index.is_contiguous()) return false;
  if (index.dim() != 1 && index.dim() != 2) return false;
  if (index.dim() == 2 && (dim == 0 || index.size(0) != activation.size(0))) return false;
  if (!scale) return true;
  if (!is_like(*scale, activation.scalar_type(), activation) || !scale->is_contiguous()) {
    return false;
  }
  if (scale->dim() != index.dim()) return false;
  for (int64_t d = 0; d < index.dim(); ++d) {
    if (scale->size(d) != index.size(d)) return false;
  }
  return true;
}

using Numbers = std::vector<int64_t>;

// Of a dense tensor with its channels, in dimension `dim`, innermost or where they stand: what
// _empty in vfmk/ops/channel_remap.py gives.
Numbers dense_strides(const Numbers& sizes, int64_t dim, bool channels_last) {
  Numbers strides(sizes.size());
  int64_t step = 1;
  if (channels_last) {
    strides[dim] = 1;
    step = std::max<int64_t>(sizes[dim], 1);
  }
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
    if (channels_last && d == dim) continue;
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  return strides;
}

// The planes of a tensor of `sizes` and `strides`, as _planes in vfmk/ops/channel_remap.py where
// that takes no copy: its own dimensions, if those are four and channels the second; else what is
// before the channels and after them runs together, if the tensor is dense. A map for each sample
// keeps dimension 0 apart.
std::optional<Planes> planes_in_place(const Numbers& sizes, const Numbers& strides, int64_t dim,
                                      bool per_sample, bool channels_last) {
  const auto last = static_cast<int64_t>(sizes.size()) - 1;
  if (last == 3 && dim == 1) {
    const int64_t innermost = channels_last ? 1 : 3;
    if (strides[innermost] != 1 && sizes[innermost] != 1) return std::nullopt;
    return Planes{sizes[0], sizes[1], sizes[2], sizes[3],
                  Strides{strides[0], strides[1], strides[2], strides[3]}};
  }
  if (channels_last && dim != last) return std::nullopt;
  const Numbers dense = dense_strides(sizes, dim, channels_last);
  for (int64_t d = 0; d <= last; ++d) {
    if (sizes[d] != 1 && strides[d] != dense[d]) return std::nullopt;
  }
  const auto product = [&](int64_t begin, int64_t end) {
    int64_t result = 1;
    for (int64_t d = begin; d < end; ++d) result *= sizes[d];
    return result;
  };
  const int64_t channels = sizes[dim];
  if (dim == last) {
    const int64_t samples = per_sample ? sizes[0] : 1;
    const int64_t pixels = product(per_sample ? 1 : 0, dim);
    return Planes{samples, channels, 1, pixels,
                  Strides{pixels * channels, 1, pixels * channels, channels}};
  }
  const int64_t rows = product(dim + 1, last), columns = sizes[last], plane = rows * columns;
  return Planes{product(0, dim), channels, rows, columns,
                Strides{channels * plane, plane, columns, 1}};
}

Numbers sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

Numbers strides_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {strides.begin(), strides.end()};
}

template <Launch launch>
MaybeTensor at_once(Tensor input, Tensor index, MaybeTensor scale, int64_t dim) {
  const int64_t last = input.dim() - 1;
  if (dim < 0) dim += last + 1;
  if (dim < 0 || dim > last || !is_dtype_of_kernels(input.scalar_type()) ||
      !index_and_scale_fit(input, index, scale, dim)) {
    return std::nullopt;
  }
  const Numbers strides = strides_of(input);
  Numbers sizes = sizes_of(input);
  const bool channels_last = dim == last || (strides[dim] == 1 && strides[last] != 1);
  const bool per_sample = index.dim() == 2;
  const auto from = planes_in_place(sizes, strides, dim, per_sample, channels_last);
  if (!from) return std::nullopt;
  sizes[dim] = index.size(index.dim() - 1);
  const Numbers output_strides = dense_strides(sizes, dim, channels_last);
  const auto to = planes_in_place(sizes, output_strides, dim, per_sample, channels_last);
  Tensor output = empty_strided(sizes, output_strides, raw_dtype(input), input);
  launch(with_input(describe(dtype_of(input, NAME), *to, per_sample ? index.size(0) : 1,
                             from->channels, channels_last),
                    from->strides),
         {input.const_data_ptr(), positions(index), data(scale), output.mutable_data_ptr()}, input,
         index);
  return output;
}

// Both gradients, empty if not wanted, or neither. `input` is read for that of the scale.
template <LaunchBackward launch>
std::vector<Tensor> gradients_at_once(Tensor grad_output, MaybeTensor input, Tensor index,
                                      MaybeTensor scale, int64_t input_channels, int64_t dim,
                                      bool channels_last, bool input_wanted, bool scale_wanted) {
  if (dim < 0 || dim >= grad_output.dim() || !is_dtype_of_kernels(grad_output.scalar_type()) ||
      !index_and_scale_fit(grad_output, index, scale, dim) ||
      index.size(index.dim() - 1) != grad_output.size(dim)) {
    return {};
  }
  Numbers sizes = sizes_of(grad_output);
  const bool per_sample = index.dim() == 2;
  const Numbers strides = dense_strides(sizes, dim, channels_last);
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1 && grad_output.stride(d) != strides[d]) return {};
  }
  const auto from = planes_in_place(sizes, strides, dim, per_sample, channels_last);
  sizes[dim] = input_channels;
  const Numbers input_strides = dense_strides(sizes, dim, channels_last);
  const auto to = planes_in_place(sizes, input_strides, dim, per_sample, channels_last);
  auto of_input = to;
  if (scale_wanted) {
    if (!scale || !input || !is_like(*input, grad_output.scalar_type(), grad_output) ||
        sizes_of(*input) != sizes) {
      return {};
    }
    of_input = planes_in_place(sizes, strides_of(*input), dim, per_sample, channels_last);
  }
  if (!from || !to || !of_input) return {};
  const int32_t dtype = raw_dtype(grad_output);
  const Tensor empty = empty_strided({0}, {1}, dtype, grad_output);
  const Tensor grad_input =
      input_wanted ? empty_strided(sizes, input_strides, dtype, grad_output) : empty;
  const Tensor grad_scale =
      scale_wanted ? empty_strided(sizes_of(index), strides_of(index), dtype, grad_output) : empty;
  launch(with_gradients(describe(dtype_of(grad_output, NAME), *from, per_sample ? index.size(0) : 1,
                                 input_channels, channels_last),
                        of_input->strides, to->strides),
         {grad_output.const_data_ptr(), scale_wanted ? data(input) : nullptr, positions(index),
          data(scale), mutable_data(grad_input), mutable_data(grad_scale), nullptr},
         grad_output, index);
  return {grad_input, grad_scale};
}

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
  m.def("channel_remap_at_once(Tensor input, Tensor index, Tensor? scale, int dim) -> Tensor?");
  m.def(
      "channel_remap_gradients_at_once(Tensor grad_output, Tensor? input, Tensor index, "
      "Tensor? scale, int input_channels, int dim, bool channels_last, bool input_wanted, "
      "bool scale_wanted) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(vfmk_native, CPU, m) {
  using namespace vfmk::channel_remap;
  m.impl("channel_remap_forward", TORCH_BOX(&forward<launch_cpu>));
  m.impl("channel_remap_backward", TORCH_BOX(&backward<launch_backward_cpu>));
  m.impl("channel_remap_at_once", TORCH_BOX(&at_once<launch_cpu>));
  m.impl("channel_remap_gradients_at_once", TORCH_BOX(&gradients_at_once<launch_backward_cpu>));
}

#if defined(VFMK_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(vfmk_native, CUDA, m) {
  using namespace vfmk::channel_remap;
  m.impl("channel_remap_forward", TORCH_BOX(&forward<launch_cuda>));
  m.impl("channel_remap_backward", TORCH_BOX(&backward<launch_backward_cuda>));
  m.impl("channel_remap_at_once", TORCH_BOX(&at_once<launch_cuda>));
  m.impl("channel_remap_gradients_at_once", TORCH_BOX(&gradients_at_once<launch_backward_cuda>));
}
#endif
