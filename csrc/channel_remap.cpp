// The PyTorch boundary of channel_remap: tensors as the user has them are checked, seen as the
// plain data of the header (what no kernel reads in place is copied), and the results allocated,
// all in one call: Python in between would take longer than many a kernel.
#include "channel_remap.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

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

using Numbers = torch::headeronly::IntHeaderOnlyArrayRef;

// Kernels count channels and maps in 32 bits; with fewer than these no product of theirs overflows.
constexpr int64_t MOST = 1 << 30;

bool on_the_same_device(const Tensor& one, const Tensor& other) {
  return one.is_cpu() == other.is_cpu() && one.get_device_index() == other.get_device_index();
}

bool is_like(const Tensor& tensor, ScalarType dtype, const Tensor& other) {
  return tensor.scalar_type() == dtype && on_the_same_device(tensor, other);
}

// Each other, and an activation with its channels in dimension `dim`.
bool arguments_fit(const Tensor& activation, const Tensor& index, const MaybeTensor& scale,
                   int64_t dim) {
  const ScalarType dtype = activation.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Half && dtype != ScalarType::BFloat16) {
    return false;
  }
  if (dim < 0 || dim >= activation.dim() || !is_like(index, ScalarType::Long, activation)) {
    return false;
  }
  if (index.dim() != 1 && index.dim() != 2) return false;
  if (index.dim() == 2 && (dim == 0 || index.size(0) != activation.size(0))) return false;
  return !scale || (is_like(*scale, dtype, activation) && scale->sizes().equals(index.sizes()));
}

// Neighbouring dimensions as one.
struct Extent {
  int64_t size = 1, stride = 0;
};

// Nothing if their strides do not allow it.
std::optional<Extent> together(Numbers sizes, Numbers strides, int64_t begin, int64_t end) {
  Extent all;
  for (int64_t d = end - 1; d >= begin; --d) {
    const int64_t size = sizes[d], stride = strides[d];
    if (size == 0) return Extent{0, 0};
    if (size == 1) continue;
    if (all.size > 1 && stride != all.size * all.stride) return std::nullopt;
    if (all.size == 1) all.stride = stride;
    all.size *= size;
  }
  return all;
}

// An activation as the kernels see it, its channels aside.
struct Planes {
  int64_t samples, rows, columns;
  Strides strides;
};

// Of a view that kernels read in place: samples are the dimensions before the channels, and columns
// the last one after them. Where no dimension is after them, samples are the first one.
std::optional<Planes> planes_in_place(const Tensor& tensor, int64_t dim, bool channels_last) {
  const Numbers sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t last = tensor.dim() - 1;
  const int64_t before = dim < last ? dim : std::min<int64_t>(1, last);
  const int64_t first = dim < last ? dim + 1 : before;
  const int64_t end = dim < last ? last + 1 : last;
  const int64_t column = std::max(end - 1, first);
  const auto samples = together(sizes, strides, 0, before);
  auto rows = together(sizes, strides, first, column);
  auto columns = together(sizes, strides, column, end);
  if (!samples || !rows || !columns) return std::nullopt;
  const Extent innermost = channels_last ? Extent{sizes[dim], strides[dim]} : *columns;
  if (innermost.size > 1 && innermost.stride != 1) return std::nullopt;
  // A single one's is any: that with which it merges.
  if (rows->size == 1) rows->stride = samples->stride;
  if (columns->size == 1) columns->stride = rows->stride;
  return Planes{samples->size, rows->size, columns->size,
                Strides{samples->stride, strides[dim], rows->stride, columns->stride}};
}

// Dense: the channels innermost or where they stand, as _empty in vfmk/ops/channel_remap.py gives.
std::vector<int64_t> dense_strides(Numbers sizes, int64_t dim, bool channels_last) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = channels_last ? std::max<int64_t>(sizes[dim], 1) : 1;
  for (auto d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
    if (channels_last && d == dim) continue;
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  if (channels_last) strides[dim] = 1;
  return strides;
}

std::vector<int64_t> sizes_with(int64_t channels, const Tensor& tensor, int64_t dim) {
  std::vector<int64_t> sizes = tensor.sizes().vec();
  sizes[dim] = channels;
  return sizes;
}

Tensor empty(const std::vector<int64_t>& sizes, int64_t dim, bool channels_last,
             const Tensor& like) {
  return empty_strided(sizes, dense_strides(sizes, dim, channels_last), raw_dtype(like), like);
}

Tensor dense_copy(const Tensor& tensor, int64_t dim, bool channels_last) {
  Tensor copy = empty(tensor.sizes().vec(), dim, channels_last, tensor);
  return torch::stable::copy_(copy, tensor);
}

bool is_dense(const Tensor& tensor, int64_t dim, bool channels_last) {
  const Numbers sizes = tensor.sizes(), strides = tensor.strides();
  const std::vector<int64_t> dense = dense_strides(sizes, dim, channels_last);
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && strides[d] != dense[d]) return false;
  }
  return true;
}

// The planes of `tensor`, or of the copy that takes its place.
Planes planes(Tensor& tensor, int64_t dim, bool channels_last) {
  if (const auto found = planes_in_place(tensor, dim, channels_last)) return *found;
  tensor = dense_copy(tensor, dim, channels_last);
  return planes_in_place(tensor, dim, channels_last).value();
}

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Without strides.
Problem describe(const Tensor& activation, const Planes& planes, const Tensor& index,
                 int64_t input_channels, bool channels_last) {
  Problem problem{};
  problem.dtype = dtype_of(activation, NAME);
  problem.channels_last = channels_last;
  problem.maps = index.dim() == 2 ? index.size(0) : 1;
  problem.input_channels = input_channels;
  problem.output_channels = index.size(index.dim() - 1);
  problem.rows = planes.rows;
  problem.columns = planes.columns;
  const bool pixels = planes.rows > 0 && planes.columns > 0;
  problem.samples = pixels && problem.maps > 0 ? planes.samples / problem.maps : 0;
  STD_TORCH_CHECK(input_channels >= 0, NAME, ": a negative number of channels");
  STD_TORCH_CHECK(std::max({problem.maps, problem.input_channels, problem.output_channels}) <= MOST,
                  NAME, ": more than 2^30 channels or maps");
  return problem;
}

// Of what `empty` gives.
Strides dense(const Problem& problem, int64_t channels) {
  const int64_t pixels = problem.rows * problem.columns;
  if (problem.channels_last) return {pixels * channels, 1, problem.columns * channels, channels};
  return {channels * pixels, pixels, problem.columns, 1};
}

// Rows, and with one map samples, that follow one another without a gap in every activation.
void merge(Problem& problem, std::initializer_list<Strides*> activations) {
  merge_rows(problem, activations);
  if (!problem.channels_last || problem.maps != 1 || problem.rows != 1) return;
  for (const Strides* strides : activations) {
    if (strides->batch != problem.columns * strides->column) return;
  }
  problem.columns *= problem.samples;
  problem.samples = 1;
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

// Nothing for arguments that do not fit: Python then says what is wrong with them.
template <Launch launch>
MaybeTensor forward(Tensor input, Tensor index, MaybeTensor scale, int64_t dim) {
  const int64_t last = input.dim() - 1;
  if (dim < 0) dim += last + 1;
  if (!arguments_fit(input, index, scale, dim)) return std::nullopt;
  const bool channels_last = dim == last || (input.stride(dim) == 1 && input.stride(last) != 1);
  const Planes from = planes(input, dim, channels_last);
  index = as_contiguous(index);
  if (scale) scale = as_contiguous(*scale);
  Problem problem = describe(input, from, index, input.size(dim), channels_last);
  Tensor output = empty(sizes_with(problem.output_channels, input, dim), dim, channels_last, input);
  problem.input = from.strides;
  problem.output = dense(problem, problem.output_channels);
  merge(problem, {&problem.input, &problem.output});
  launch(problem,
         {input.const_data_ptr(), positions(index), data(scale), output.mutable_data_ptr()}, input,
         index);
  return output;
}

// Both gradients, empty if not wanted. `input` is read for that of the scale.
template <LaunchBackward launch>
std::tuple<Tensor, Tensor> backward(Tensor grad_output, MaybeTensor input, Tensor index,
                                    MaybeTensor scale, int64_t input_channels, int64_t dim,
                                    bool channels_last, bool input_wanted, bool scale_wanted) {
  STD_TORCH_CHECK(arguments_fit(grad_output, index, scale, dim) &&
                      grad_output.size(dim) == index.size(index.dim() - 1),
                  NAME, ": grad_output, index and scale do not fit");
  channels_last |= dim == grad_output.dim() - 1;
  // In one order, whatever its strides: so are the sums, but for how `input` lies.
  if (!is_dense(grad_output, dim, channels_last)) {
    grad_output = dense_copy(grad_output, dim, channels_last);
  }
  const Planes from = planes(grad_output, dim, channels_last);
  index = as_contiguous(index);
  if (scale) scale = as_contiguous(*scale);
  Problem problem = describe(grad_output, from, index, input_channels, channels_last);
  problem.output = from.strides;
  problem.input = problem.grad_input = dense(problem, input_channels);
  const std::vector<int64_t> sizes = sizes_with(input_channels, grad_output, dim);
  if (scale_wanted) {
    STD_TORCH_CHECK(scale && input && is_like(*input, grad_output.scalar_type(), grad_output) &&
                        input->sizes().equals(sizes),
                    NAME, ": input and grad_output do not fit");
    problem.input = planes(*input, dim, channels_last).strides;
  }
  merge(problem, {&problem.output, &problem.input, &problem.grad_input});
  const std::vector<int64_t> nothing = {0};
  const Tensor grad_input = input_wanted ? empty(sizes, dim, channels_last, grad_output)
                                         : empty(nothing, 0, false, grad_output);
  const Tensor grad_scale =
      empty(scale_wanted ? index.sizes().vec() : nothing, 0, false, grad_output);
  launch(problem,
         {grad_output.const_data_ptr(), scale_wanted ? data(input) : nullptr, positions(index),
          data(scale), mutable_data(grad_input), mutable_data(grad_scale), nullptr},
         grad_output, index);
  return {grad_input, grad_scale};
}

}  // namespace
}  // namespace vfmk::channel_remap

STABLE_TORCH_LIBRARY_FRAGMENT(vfmk_native, m) {
  m.def("channel_remap_forward(Tensor input, Tensor index, Tensor? scale, int dim) -> Tensor?");
  m.def(
      "channel_remap_backward(Tensor grad_output, Tensor? input, Tensor index, Tensor? scale, "
      "int input_channels, int dim, bool channels_last, bool input_wanted, bool scale_wanted) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(vfmk_native, CPU, m) {
  using namespace vfmk::channel_remap;
  m.impl("channel_remap_forward", TORCH_BOX(&forward<launch_cpu>));
  m.impl("channel_remap_backward", TORCH_BOX(&backward<launch_backward_cpu>));
}

#if defined(VFMK_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(vfmk_native, CUDA, m) {
  using namespace vfmk::channel_remap;
  m.impl("channel_remap_forward", TORCH_BOX(&forward<launch_cuda>));
  m.impl("channel_remap_backward", TORCH_BOX(&backward<launch_backward_cuda>));
}
#endif
