// One fp32 vector, as wide as the instruction set this unit is compiled for, its loads and stores
// from float32, float16 and bfloat16, and the choice among these. Internal linkage throughout: the
// linker must not lend a function compiled for AVX-512 to the unit that runs on a machine without
// it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../dtype.h"

namespace vfmk {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Lane __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * LANES)));

// A storage format: its element, a vector of raw elements, and the way to fp32 and back, rounding
// to nearest even and keeping infinities and NaN.
struct Float32 {
  using Element = float;
  using Raw = Vec;
  static Vec decode(Raw raw) { return raw; }
  static Raw encode(Vec value) { return value; }
};

struct BFloat16 {
  using Element = uint16_t;
  using Raw = HalfBits;
  static Vec decode(Raw raw) { return (Vec)(__builtin_convertvector(raw, Bits) << 16); }
  static Raw encode(Vec value) {
    const Bits bits = (Bits)value;
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits quiet = (bits >> 16) | 0x40;  // rounding could carry a NaN into infinity
    return __builtin_convertvector(value == value ? rounded : quiet, HalfBits);
  }
};

struct Float16 {
  using Element = uint16_t;
  using Raw = HalfBits;
#if defined(__AVX512F__)
  static Vec decode(Raw raw) { return (Vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)raw); }
  static Raw encode(Vec value) { return (Raw)_mm512_maskz_cvtps_ph(0xffff, (__m512)value, 0); }
#elif defined(__F16C__)
  static Vec decode(Raw raw) { return (Vec)_mm256_cvtph_ps((__m128i)raw); }
  static Raw encode(Vec value) { return (Raw)_mm256_cvtps_ph((__m256)value, 0); }
#else
  static Vec decode(Raw raw) {
    const Bits half = __builtin_convertvector(raw, Bits);
    const Bits magnitude = (half & 0x7fff) << 13;
    const Bits scaled = (Bits)((Vec)magnitude * 0x1p112f);  // exponent bias 15 to 127
    const Bits special = magnitude >= 0x0f800000 ? scaled | 0x7f800000 : scaled;
    return (Vec)(special | (half & 0x8000) << 16);
  }
  static Raw encode(Vec value) {
    const Bits sign = (Bits)value & 0x80000000;
    const Bits magnitude = (Bits)value ^ sign;
    // Below 2^-14 the adder rounds: 0.5 has the last place of a float16 subnormal.
    const Bits subnormal = (Bits)((Vec)magnitude + 0.5f) - 0x3f000000;
    const Bits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const Bits finite = magnitude < (113u << 23) ? subnormal : normal;
    const Bits infinite = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
    const Bits half = magnitude >= (143u << 23) ? infinite : finite;
    return __builtin_convertvector(half | sign >> 16, HalfBits);
  }
#endif
};

inline Lane lane_index() {
  Lane index;
  for (int lane = 0; lane < LANES; ++lane) index[lane] = lane;
  return index;
}

// The first `count` lanes in memory; the others read as zero and are not written. count may exceed
// LANES.
template <typename Format>
inline Vec load(const typename Format::Element* from, int64_t count = LANES) {
  typename Format::Raw raw = {};
  if (count >= LANES) {
    std::memcpy(&raw, from, sizeof raw);
  } else {
#if defined(__AVX512F__)
    if constexpr (sizeof *from == 4) {
      raw = (Vec)_mm512_maskz_loadu_ps((1 << count) - 1, from);
    } else {
      raw = (HalfBits)_mm256_maskz_loadu_epi16((1 << count) - 1, from);
    }
#elif defined(__AVX2__)
    if constexpr (sizeof *from == 4) {
      raw = (Vec)_mm256_maskload_ps(from, (__m256i)(lane_index() < static_cast<int32_t>(count)));
    } else {
      for (int lane = 0; lane < count; ++lane) raw[lane] = from[lane];
    }
#else
    for (int lane = 0; lane < count; ++lane) raw[lane] = from[lane];
#endif
  }
  return Format::decode(raw);
}

template <typename Format>
inline void store(typename Format::Element* to, Vec value, int64_t count = LANES) {
  const typename Format::Raw raw = Format::encode(value);
  if (count >= LANES) {
    std::memcpy(to, &raw, sizeof raw);
  } else {
#if defined(__AVX512F__)
    if constexpr (sizeof *to == 4) {
      _mm512_mask_storeu_ps(to, (1 << count) - 1, (__m512)raw);
    } else {
      _mm256_mask_storeu_epi16(to, (1 << count) - 1, (__m256i)raw);
    }
#else
    for (int lane = 0; lane < count; ++lane) to[lane] = raw[lane];
#endif
  }
}

// The value, loaded once: without this GCC repeats a load in every multiply-add that uses it.
inline Vec in_register(Vec value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
  return value;
}

inline Vec masked(Vec value, Lane mask) { return (Vec)((Lane)value & mask); }

// A difference, since -0 + 0 is not -0: the addition would have to be made.
inline Vec broadcast(float value) { return value - Vec{}; }

// b where one of them is NaN, as the instruction has it.
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

inline float sum_of_lanes(Vec value) {
  for (int step = LANES / 2; step > 0; step /= 2) {
    value += __builtin_shuffle(value, lane_index() ^ step);
  }
  return value[0];
}

// 2^x for x below 127.5, within a relative error of 1e-7. Exactly 0 from about -126.5 downwards.
inline Vec exp2(Vec x) {
  // The last place of numbers near 1.5 * 2^23 is 1; the 127 is the exponent bias.
  const float rounding = 0x1.8p23f + 127;
  x = maximum(broadcast(-127), x);
  const Vec shifted = x + rounding;
  const Vec power = (Vec)((Bits)shifted << 23);
  const Vec r = x - (shifted - rounding);
  // Minimax on [-1/2, 1/2]: relative error 2e-9, and 2^0 is 1.
  Vec sum = r * 1.53533632e-4f + 1.33988749e-3f;
  sum = sum * r + 9.61843736e-3f;
  sum = sum * r + 5.55033247e-2f;
  sum = sum * r + 2.40226479e-1f;
  sum = sum * r + 6.93147203e-1f;
  sum = sum * r + 1.0f;
  return sum * power;
}

// Two rows of a square, `step` apart: in blocks of `step` lanes, low takes the first and high the
// second block of each pair, from a and from b in turn.
inline void interleave(Vec a, Vec b, int step, Vec& low, Vec& high) {
  const Lane lane = lane_index();
  const Lane odd = (lane & step) != 0;
  low = __builtin_shuffle(a, b, odd ? lane - step + LANES : lane);
  high = __builtin_shuffle(a, b, odd ? lane + LANES : lane + step);
}

// rows[i][j] and rows[j][i] change places.
inline void transpose(Vec (&rows)[LANES]) {
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if ((i & step) == 0) interleave(rows[i], rows[i + step], step, rows[i], rows[i + step]);
    }
  }
}

// Lane i of the result combines all lanes of rows[i], which are lost.
template <typename Combine>
inline Vec combine_lanes(Vec (&rows)[LANES], const Combine& combine) {
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 2 * step) {
      Vec low, high;
      interleave(rows[i], rows[i + step], step, low, high);
      rows[i] = combine(low, high);
    }
  }
  return rows[0];
}

// function(Float32{}) or as the dtype is.
template <typename Function>
void with_format(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float32:
      return function(Float32{});
    case DType::float16:
      return function(Float16{});
    case DType::bfloat16:
      return function(BFloat16{});
  }
}

}  // namespace
}  // namespace vfmk
