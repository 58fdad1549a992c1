// What every CUDA operator shares: the launch, the element types, asynchronous copies and the
// warp-wide matrix instructions. No torch. The instructions are spelled in PTX because CUDA C++ has
// no names for them; tests/cuda_host gives each a meaning on the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#ifndef VFMK_HOST_HARNESS
#define VFMK_LAUNCH(kernel, blocks, threads, shared_bytes, stream) \
  kernel<<<blocks, threads, shared_bytes, stream>>>
#define VFMK_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace vfmk::cuda {

// Null, or what went wrong. Neither synchronises nor allocates: safe under graph capture.
template <typename... Parameters, typename... Values>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                   void* stream, const Values&... values) {
  constexpr size_t kSharedWithoutAsking = 48 * 1024;
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "the grid has more than 2^31 - 1 blocks";
  if (shared_bytes > kSharedWithoutAsking) {
    cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  VFMK_LAUNCH(kernel, static_cast<unsigned>(blocks), threads, shared_bytes,
              static_cast<cudaStream_t>(stream))(values...);
  cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Of an H200: sizes of tiles follow it everywhere, so that results do not depend on the device.
inline int multiprocessors() {
#ifdef VFMK_HOST_HARNESS
  return cuda_host::multiprocessors;
#else
  return 132;
#endif
}

// Division of numbers below 2^31 by one that the host knows: a multiplication instead.
struct Divisor {
  uint32_t divisor = 1, magic = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t value) : divisor(value) {
    while ((uint64_t{1} << shift) < value) ++shift;
    magic =
        static_cast<uint32_t>(((uint64_t{1} << shift) - value) * (uint64_t{1} << 32) / value + 1);
  }
  // The quotient; `number` becomes the remainder.
  __device__ uint32_t divide(uint32_t& number) const {
    const uint32_t quotient = (__umulhi(number, magic) + number) >> shift;
    number -= quotient * divisor;
    return quotient;
  }
};

// A value that the compiler cannot follow: what is computed from it is computed where it is used,
// instead of before a loop, to occupy registers all through it.
__device__ inline int hidden(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

template <typename T>
inline constexpr int kVector = 16 / sizeof(T);  // elements in a 16-byte access
template <typename T>
inline constexpr int kVectorBits = sizeof(T) == 2 ? 3 : 2;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ inline T from_float(float value) {
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(value);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(value);
  if constexpr (std::is_same_v<T, float>) return value;
}

// Two 16-bit elements in one register, the first in the low half.
__device__ inline uint32_t pack(__half low, __half high) {
  return __half_as_ushort(low) | static_cast<uint32_t>(__half_as_ushort(high)) << 16;
}
__device__ inline uint32_t pack(__nv_bfloat16 low, __nv_bfloat16 high) {
  return __bfloat16_as_ushort(low) | static_cast<uint32_t>(__bfloat16_as_ushort(high)) << 16;
}

template <typename T>
__device__ inline uint32_t pack_floats(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 both = __floats2half2_rn(low, high);
    return pack(both.x, both.y);
  } else {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return pack(both.x, both.y);
  }
}

// Where a byte of shared memory lies, as the instructions below take it.
#ifdef VFMK_HOST_HARNESS
using SharedAddress = uintptr_t;
__device__ inline SharedAddress shared_address(const void* shared) {
  return reinterpret_cast<SharedAddress>(shared);
}
#else
using SharedAddress = uint32_t;
__device__ inline SharedAddress shared_address(const void* shared) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(shared));
}
#endif

// Copies kBytes to shared memory, or puts zeros there. Both addresses are multiples of kBytes. Done
// once wait_for_copies() returns; other threads see it after a barrier.
template <int kBytes>
__device__ inline void copy_async(SharedAddress shared, const void* global, bool exists) {
#ifdef VFMK_HOST_HARNESS
  cuda_host::copy_async(shared, global, kBytes, exists);
#else
  const int missing = !exists;
  if constexpr (kBytes == 16) {
    asm volatile(
        "{.reg .pred missing; setp.ne.b32 missing, %2, 0;"
        " cp.async.cg.shared.global [%0], [%1], 16, missing;}" ::"r"(shared),
        "l"(global), "r"(missing)
        : "memory");
  } else {
    asm volatile(
        "{.reg .pred missing; setp.ne.b32 missing, %2, 0;"
        " cp.async.ca.shared.global [%0], [%1], %3, missing;}" ::"r"(shared),
        "l"(global), "r"(missing), "n"(kBytes)
        : "memory");
  }
#endif
}

__device__ inline void wait_for_copies() {
#ifdef VFMK_HOST_HARNESS
  cuda_host::wait_for_copies();
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// kCount (1, 2 or 4) 8x8 matrices of 16-bit elements, one register each. Lane l gives the address
// of row l % 8 of matrix l / 8 (16 bytes, so aligned) and receives elements [l / 4][2 * (l % 4)]
// and the one after; transposed: [2 * (l % 4)][l / 4] and the one below. All lanes give valid
// addresses.
template <bool kTransposed, int kCount>
__device__ inline void load_matrices(uint32_t (&matrix)[kCount], SharedAddress row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
#ifdef VFMK_HOST_HARNESS
  cuda_host::load_matrices(matrix, kCount, row, kTransposed);
#else
  if constexpr (kCount == 1 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(matrix[0])
                 : "r"(row)
                 : "memory");
  } else if constexpr (kCount == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(matrix[0])
                 : "r"(row)
                 : "memory");
  } else if constexpr (kCount == 2 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(matrix[0]), "=r"(matrix[1])
                 : "r"(row)
                 : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(matrix[0]), "=r"(matrix[1])
                 : "r"(row)
                 : "memory");
  } else if constexpr (!kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(row)
                 : "memory");
  }
#endif
}

// sums[16,8] += left[16,16] * right[16,8] on the tensor cores, with fp32 sums. With g = lane / 4
// and t = lane % 4, a lane holds
//   left   [g][2t], [g+8][2t], [g][2t+8], [g+8][2t+8], each with the element of the next column,
//   right  [2t][g], [2t+8][g], each with the element of the next row,
//   sums   [g][2t], [g][2t+1], [g+8][2t], [g+8][2t+1].
template <typename T>
__device__ inline void multiply_add(float (&sums)[4], const uint32_t (&left)[4], uint32_t right0,
                                    uint32_t right1) {
#ifdef VFMK_HOST_HARNESS
  cuda_host::multiply_add<T>(sums, left, {right0, right1});
#else
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
  }
#endif
}

}  // namespace vfmk::cuda
