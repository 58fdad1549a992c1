// Integer arithmetic that the kernels share. Internal linkage throughout, as in vector.h.
#pragma once

#include <cstdint>

namespace vfmk {
namespace {

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t clamp(int64_t a, int64_t low, int64_t high) {
  return maximum(minimum(a, high), low);
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace
}  // namespace vfmk
