// Tensors as operators take them apart at the PyTorch boundary.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "dtype.h"

namespace vfmk {

inline DType dtype_of(const torch::stable::Tensor& tensor, const char* op) {
  using torch::headeronly::ScalarType;
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

inline const void* data(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// An empty gradient is not computed either: its pointer is null.
inline void* mutable_data(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor && tensor->numel() > 0 ? tensor->mutable_data_ptr() : nullptr;
}

inline torch::stable::Tensor new_workspace(int64_t floats, const torch::stable::Tensor& like) {
  using torch::headeronly::ScalarType;
  return torch::stable::empty({floats}, ScalarType::Float, std::nullopt, like.device());
}

}  // namespace vfmk
