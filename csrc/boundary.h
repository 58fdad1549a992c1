// What the PyTorch boundaries of operators share: the choice of an instruction set, and the step
// from a tensor to plain data.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "dtype.h"
#include "library.h"

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

namespace vfmk {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      STD_TORCH_CHECK(false, "vfmk: a kernel was given an unsupported dtype");
  }
}

inline void* mutable_data(const MaybeTensor& tensor) {
  return tensor ? tensor->mutable_data_ptr() : nullptr;
}

inline Tensor new_workspace(int64_t floats, const Tensor& like) {
  return torch::stable::empty({floats}, torch::headeronly::ScalarType::Float, std::nullopt,
                              like.device());
}

}  // namespace vfmk
