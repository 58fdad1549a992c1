// What the PyTorch boundaries of operators share: the choice of an instruction set, the step from a
// tensor to plain data, and the checks without which a kernel could leave a tensor's memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtype.h"
#include "library.h"
#include "strides.h"

#if defined(VFMK_WITH_CUDA)
#include <torch/csrc/stable/accelerator.h>

// Exported by libtorch_cuda alone: null under a CPU-only torch, where the library loads as well.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

// Returns ISA::call, for the kernels that a file under cpu/ has compiled for each instruction set.
#if defined(__x86_64__)
#define VFMK_DISPATCH(call)        \
  switch (::vfmk::cpu_isa()) {     \
    case ::vfmk::CpuIsa::avx512:   \
      return avx512::call;         \
    case ::vfmk::CpuIsa::avx2:     \
      return avx2::call;           \
    case ::vfmk::CpuIsa::baseline: \
      return baseline::call;       \
  }                                \
  return baseline::call
#else
#define VFMK_DISPATCH(call) return baseline::call
#endif

// For an operator's namespace `cpu`: its two passes and their workspaces, declared for each
// instruction set, and dispatched to the one in force.
#define VFMK_DECLARE_PASSES(isa)                                    \
  namespace isa {                                                   \
  int64_t forward_workspace_floats(const Problem& problem);         \
  int64_t backward_workspace_floats(const Problem& problem);        \
  void forward(const Problem& problem, const Forward& arguments);   \
  void backward(const Problem& problem, const Backward& arguments); \
  }
#define VFMK_DECLARE_AND_DISPATCH                                    \
  VFMK_DECLARE_PASSES(baseline)                                      \
  VFMK_DECLARE_PASSES(avx2)                                          \
  VFMK_DECLARE_PASSES(avx512)                                        \
  int64_t forward_workspace_floats(const Problem& problem) {         \
    VFMK_DISPATCH(forward_workspace_floats(problem));                \
  }                                                                  \
  int64_t backward_workspace_floats(const Problem& problem) {        \
    VFMK_DISPATCH(backward_workspace_floats(problem));               \
  }                                                                  \
  void forward(const Problem& problem, const Forward& arguments) {   \
    VFMK_DISPATCH(forward(problem, arguments));                      \
  }                                                                  \
  void backward(const Problem& problem, const Backward& arguments) { \
    VFMK_DISPATCH(backward(problem, arguments));                     \
  }

namespace vfmk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& tensor, const char* op) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      STD_TORCH_CHECK(false, op, ": unsupported dtype");
  }
}

inline const void* data(const MaybeTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// An empty gradient is not computed either: its pointer is null.
inline void* mutable_data(const MaybeTensor& tensor) {
  return tensor && tensor->numel() > 0 ? tensor->mutable_data_ptr() : nullptr;
}

inline const int64_t* positions(const MaybeTensor& index) {
  return static_cast<const int64_t*>(data(index));
}

inline Strides strides(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

// Rows that follow one another without a gap in every activation become one.
template <typename Problem>
void merge_rows(Problem& problem, std::initializer_list<Strides*> activations) {
  for (const Strides* strides : activations) {
    const int64_t step = problem.channels_last ? strides->column : 1;
    if (strides->row != problem.columns * step) return;
  }
  problem.columns *= problem.rows;
  problem.rows = 1;
  if (problem.channels_last) return;
  for (Strides* strides : activations) strides->column = 1;  // of one column it was any
}

// Uninitialised, on the device of `like`; straight from the allocator, past the dispatcher.
inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            int32_t dtype, const Tensor& like) {
  int32_t device = 0;
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                         sizes.data(), strides.data(), dtype,
                                                         device, like.get_device_index(), &result));
  return Tensor(result);
}

inline int32_t raw_dtype(const Tensor& tensor) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

inline Tensor new_workspace(int64_t floats, const Tensor& like) {
  return empty_strided({floats}, {1}, aoti_torch_dtype_float32(), like);
}

// What a kernel takes for granted of a tensor's strides.
enum class Layout {
  dense_channels,  // dimension 1
  dense_last,
  packed,  // without gaps, the dimensions in any order
  contiguous,
};

inline Layout activation_layout(bool channels_last) {
  return channels_last ? Layout::dense_channels : Layout::dense_last;
}

inline const char* describe(Layout layout) {
  switch (layout) {
    case Layout::dense_channels:
      return "dense in dimension 1";
    case Layout::dense_last:
      return "dense in the last dimension";
    case Layout::packed:
      return "dense in memory";
    default:
      return "contiguous";
  }
}

inline bool has_layout(const Tensor& tensor, Layout layout) {
  if (tensor.numel() == 0) return true;
  const auto is_dense = [&](int64_t dim) {
    return tensor.size(dim) == 1 || tensor.stride(dim) == 1;
  };
  switch (layout) {
    case Layout::dense_channels:
      return is_dense(1);
    case Layout::dense_last:
      return is_dense(tensor.dim() - 1);
    case Layout::packed: {
      int64_t last = 0;
      for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
        last += (tensor.size(dim) - 1) * tensor.stride(dim);
      }
      return last + 1 == tensor.numel();
    }
    default:
      return tensor.is_contiguous();
  }
}

struct Argument {
  const char* name;
  MaybeTensor tensor;
  Layout layout;
};

// Kernels read and write every one of these tensors in one dtype: with another they would leave its
// memory.
inline void check_arguments(const char* op, ScalarType dtype,
                            std::initializer_list<Argument> arguments) {
  using torch::headeronly::toString;
  for (const auto& [name, tensor, layout] : arguments) {
    if (!tensor) continue;
    STD_TORCH_CHECK(tensor->scalar_type() == dtype, op, ": ", name, " must be ", toString(dtype),
                    ", got ", toString(tensor->scalar_type()));
    STD_TORCH_CHECK(has_layout(*tensor, layout), op, ": ", name, " must be ", describe(layout));
  }
}

// Python knows the exception as an IndexError.
inline void check_range(const char* op, const Tensor& index, int64_t channels) {
  const int64_t* position = positions(index);
  for (const int64_t* end = position + index.numel(); position < end; ++position) {
    if (*position >= 0 && *position < channels) continue;
    throw std::out_of_range(std::string(op) + ": index holds " + std::to_string(*position) +
                            ", input has " + std::to_string(channels) + " channels");
  }
}

#if defined(VFMK_WITH_CUDA)

inline void* current_stream(const Tensor& tensor, const char* op) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op, ": this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

// `message` is null, or what a launch reports.
inline void check_launch(const char* op, const char* message) {
  STD_TORCH_CHECK(message == nullptr, op, ": ", message);
}

#endif

}  // namespace vfmk
