// Half precision for g++: see cuda_runtime.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  const float sign = value.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (value != value) return {0x7FFF};
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  // Units of the last place: 2^-24 below 2^-14, else 2^(exponent - 10). nearbyint rounds to even,
  // and a fraction that overflows carries into the exponent.
  int exponent = -14;
  if (magnitude >= std::ldexp(1.0f, -14)) exponent = std::ilogb(magnitude);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + units))};
}

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline uint16_t __half_as_ushort(__half value) { return value.bits; }

template <>
inline float cuda_host::element_to_float<__half>(uint16_t bits) {
  return __half2float({bits});
}
