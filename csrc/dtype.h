// Storage formats of the tensors that kernels take.
#pragma once

#include <cstdint>

namespace vfmk {

enum class DType : int32_t { float32, float16, bfloat16 };

}  // namespace vfmk
