// Channels in another order, scaled; backward by gathering over the inverse of the map.
//
//                     a thread holds                             neighbouring threads
//   NCHW              kUnits vectors of one channel's plane      next vectors of the plane
//   channels-last     one vector of channels at kPixels pixels   next channels of the same pixels
//
// Vectors are 16 bytes, or single elements where sizes, strides or addresses are odd. In
// channels-last a vector of neighbours that come from aligned neighbours (most of a map that
// exchanges a few channels) is read at once, any other element by element out of the pixels' lines
// in the first-level cache. Everything stays in registers; there is no shared memory but for the
// last sums.
//
// Backward: inverse_kernel lists each input channel's readers, the output channels that read it, in
// ascending order, by counting: they start where as many outputs read a smaller channel. Each
// element of grad_input is the sum over its readers, written once. A reader has one channel, so the
// thread (NCHW: warp) that adds it up also owns its sum for grad_scale; those partial sums lie in
// the workspace and are added in a fixed order: no atomics, the same bits on each run.
//
// Bytes, for N elements of s bytes in and out: forward 2Ns, the floor is 2Ns over the bandwidth;
// backward 2Ns, with grad_scale 3Ns.
//
// An index outside the input reads nothing and gives NaN, in the output and in grad_scale.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../channel_remap.h"
#include "launch.h"

namespace vfmk::channel_remap::cuda {
namespace {

using namespace vfmk::cuda;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kUnits = 4;           // vectors of a thread in NCHW
constexpr int kPixels = 4;          // of a thread in channels-last, at once
constexpr int kBatches = 8;         // of kPixels, one after the other, that share a partial sum
constexpr int kBackwardBlocks = 4;  // at least, of a multiprocessor: 128 registers, and no spill
constexpr int kSummed = 32;         // channels of a block of sum_kernel

struct Kernel {  // what every kernel takes: the problem and its tensors
  Problem problem;
  Forward forward;
  Backward backward;
  int32_t* starts;       // [maps][input_channels + 1]
  int32_t* readers;      // [maps][output_channels]
  float* sums;           // [maps * samples][parts][output_channels]
  int64_t parts;         // partial sums of a sample
  int64_t per_plane;     // NCHW: blocks of a plane; channels-last: blocks of a sample's pixels
  int64_t across;        // channels-last: blocks of the channels
  int lanes, lane_bits;  // channels-last: threads side by side, a power of two
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
__device__ inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T, int kWidth>
__device__ void load(T (&to)[kWidth], const T* from) {
  if constexpr (kWidth > 1) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    memcpy(to, &raw, sizeof raw);
  } else {
    to[0] = *from;
  }
}

template <typename T, int kWidth>
__device__ void store(T* to, const T (&from)[kWidth]) {
  if constexpr (kWidth > 1) {
    uint4 raw;
    memcpy(&raw, from, sizeof raw);
#if defined(__CUDA_ARCH__)  // nvcc would make four stores of it in channels-last
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(raw.x), "r"(raw.y),
                 "r"(raw.z), "r"(raw.w)
                 : "memory");
#else
    *reinterpret_cast<uint4*>(to) = raw;
#endif
  } else {
    *to = from[0];
  }
}

template <typename T>
__device__ float factor_of(const void* scale, int64_t entry) {
  return scale ? to_float(static_cast<const T*>(scale)[entry]) : 1.0f;
}

// Where pixel number `pixel` of a sample lies.
__device__ inline int64_t offset_of(const Problem& problem, const Strides& strides, int64_t pixel) {
  if (problem.rows == 1) return pixel * strides.column;
  const int64_t row = pixel / problem.columns;
  return row * strides.row + (pixel - row * problem.columns) * strides.column;
}

// One block of an NCHW plane: kUnits * kThreads vectors, the thread's first among them.
template <int kWidth>
struct Plane {
  int64_t sample, channel, map, first, pixels;

  __device__ Plane(const Kernel& kernel, int64_t channels) {
    const int64_t plane = blockIdx.x / kernel.per_plane;
    sample = plane / channels;
    channel = plane - sample * channels;
    map = sample / kernel.problem.samples;
    first = (blockIdx.x - plane * kernel.per_plane) * kUnits * kThreads + threadIdx.x;
    pixels = kernel.problem.rows * kernel.problem.columns;
  }
  __device__ int64_t pixel(int unit) const { return (first + unit * kThreads) * kWidth; }
  __device__ bool exists(int unit) const { return pixel(unit) < pixels; }
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) forward_planes_kernel(Kernel kernel) {
  const Problem& problem = kernel.problem;
  const Plane<kWidth> plane(kernel, problem.output_channels);
  const int64_t entry = plane.map * problem.output_channels + plane.channel;
  const int64_t source = kernel.forward.index[entry];
  const bool inside = source >= 0 && source < problem.input_channels;
  const float factor = factor_of<T>(kernel.forward.scale, entry);
  const T* from = static_cast<const T*>(kernel.forward.input) + plane.sample * problem.input.batch +
                  (inside ? source : 0) * problem.input.channel;
  T* to = static_cast<T*>(kernel.forward.output) + plane.sample * problem.output.batch +
          plane.channel * problem.output.channel;
  T values[kUnits][kWidth];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    for (T& value : values[u]) value = from_float<T>(NAN);
    if (inside && plane.exists(u)) {
      load(values[u], from + offset_of(problem, problem.input, plane.pixel(u)));
    }
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (!plane.exists(u)) continue;
    if (kernel.forward.scale) {
      for (T& value : values[u]) value = from_float<T>(to_float(value) * factor);
    }
    store(to + offset_of(problem, problem.output, plane.pixel(u)), values[u]);
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) backward_planes_kernel(Kernel kernel) {
  const Problem& problem = kernel.problem;
  const Backward& tensors = kernel.backward;
  const Plane<kWidth> plane(kernel, problem.input_channels);
  const int32_t* starts = kernel.starts + plane.map * (problem.input_channels + 1) + plane.channel;
  const int32_t* readers = kernel.readers + plane.map * problem.output_channels;
  const T* gradients =
      static_cast<const T*>(tensors.grad_output) + plane.sample * problem.output.batch;
  T own[kUnits][kWidth];
  float totals[kUnits][kWidth] = {};
  if (tensors.grad_scale) {
    const T* from = static_cast<const T*>(tensors.input) + plane.sample * problem.input.batch +
                    plane.channel * problem.input.channel;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      for (T& value : own[u]) value = from_float<T>(0.0f);
      if (plane.exists(u)) load(own[u], from + offset_of(problem, problem.input, plane.pixel(u)));
    }
  }
  for (int32_t r = starts[0]; r < starts[1]; ++r) {
    const int64_t reader = readers[r];
    const float factor = factor_of<T>(tensors.scale, plane.map * problem.output_channels + reader);
    const T* from = gradients + reader * problem.output.channel;
    T gradient[kUnits][kWidth];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      for (T& value : gradient[u]) value = from_float<T>(0.0f);
      if (plane.exists(u)) {
        load(gradient[u], from + offset_of(problem, problem.output, plane.pixel(u)));
      }
    }
    float sum = 0;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        totals[u][e] += factor * to_float(gradient[u][e]);
        if (tensors.grad_scale) sum += to_float(gradient[u][e]) * to_float(own[u][e]);
      }
    }
    if (tensors.grad_scale) {
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      if (threadIdx.x % 32 == 0) {
        const int64_t part = blockIdx.x % kernel.per_plane * kWarps + threadIdx.x / 32;
        kernel.sums[(plane.sample * kernel.parts + part) * problem.output_channels + reader] = sum;
      }
    }
  }
  if (!tensors.grad_input) return;
  T* to = static_cast<T*>(tensors.grad_input) + plane.sample * problem.grad_input.batch +
          plane.channel * problem.grad_input.channel;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (!plane.exists(u)) continue;
    T values[kWidth];
    for (int e = 0; e < kWidth; ++e) values[e] = from_float<T>(totals[u][e]);
    store(to + offset_of(problem, problem.grad_input, plane.pixel(u)), values);
  }
}

// One block of a channels-last sample: `lanes` vectors of channels side by side, and
// kThreads / lanes groups of threads, each with kBatches * kPixels pixels.
template <int kWidth>
struct Pixels {
  int64_t sample, map, channel, group, first, pixels;

  __device__ Pixels(const Kernel& kernel) {
    const int64_t block = blockIdx.x / kernel.across;
    sample = block / kernel.per_plane;
    map = sample / kernel.problem.samples;
    channel =
        ((blockIdx.x - block * kernel.across) * kernel.lanes + (threadIdx.x & (kernel.lanes - 1))) *
        kWidth;
    const int groups = kThreads >> kernel.lane_bits;
    group = (block - sample * kernel.per_plane) * groups + (threadIdx.x >> kernel.lane_bits);
    first = group * kBatches * kPixels;
    pixels = kernel.problem.rows * kernel.problem.columns;
  }
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) forward_pixels_kernel(Kernel kernel) {
  const Problem& problem = kernel.problem;
  const Pixels<kWidth> place(kernel);
  if (place.channel >= problem.output_channels) return;
  const int64_t entry = place.map * problem.output_channels + place.channel;
  int32_t sources[kWidth];  // -1: outside
  float factors[kWidth];
  bool neighbours = kWidth > 1;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    const int64_t source = kernel.forward.index[entry + e];
    const bool inside = source >= 0 && source < problem.input_channels;
    sources[e] = inside ? static_cast<int32_t>(source) : -1;
    factors[e] = factor_of<T>(kernel.forward.scale, entry + e);
    neighbours &= sources[e] == sources[0] + e;
  }
  neighbours &= sources[0] >= 0 && sources[0] % kWidth == 0;
  const T* from = static_cast<const T*>(kernel.forward.input) + place.sample * problem.input.batch;
  T* to =
      static_cast<T*>(kernel.forward.output) + place.sample * problem.output.batch + place.channel;
  const int64_t end = least(place.first + kBatches * kPixels, place.pixels);
  for (int64_t pixel = place.first; pixel < end; pixel += kPixels) {
    T values[kPixels][kWidth];
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      if (pixel + p >= end) continue;
      const T* at = from + offset_of(problem, problem.input, pixel + p);
      if (neighbours) {
        load(values[p], at + sources[0]);
      } else {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          values[p][e] = sources[e] < 0 ? from_float<T>(NAN) : at[sources[e]];
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      if (pixel + p >= end) continue;
      if (kernel.forward.scale) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          values[p][e] = from_float<T>(to_float(values[p][e]) * factors[e]);
        }
      }
      store(to + offset_of(problem, problem.output, pixel + p), values[p]);
    }
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks) backward_pixels_kernel(Kernel kernel) {
  const Problem& problem = kernel.problem;
  const Backward& tensors = kernel.backward;
  const Pixels<kWidth> place(kernel);
  if (place.channel >= problem.input_channels || place.group >= kernel.parts) return;
  const int32_t* starts = kernel.starts + place.map * (problem.input_channels + 1) + place.channel;
  const int32_t* readers = kernel.readers + place.map * problem.output_channels;
  const int64_t entries = place.map * problem.output_channels;
  float* sums = kernel.sums + (place.sample * kernel.parts + place.group) * problem.output_channels;
  const T* gradients =
      static_cast<const T*>(tensors.grad_output) + place.sample * problem.output.batch;
  const int64_t end = least(place.first + kBatches * kPixels, place.pixels);
  // One reader each, and those are aligned neighbours.
  bool neighbours = kWidth > 1;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) neighbours &= starts[e + 1] == starts[e] + 1;
  const int32_t first_reader = neighbours ? readers[starts[0]] : 0;
  if (neighbours) {
    for (int e = 1; e < kWidth; ++e) neighbours &= readers[starts[e]] == first_reader + e;
    neighbours &= first_reader % kWidth == 0;
  }

  for (int64_t pixel = place.first; pixel < end; pixel += kPixels) {
    T own[kPixels][kWidth], together[kPixels][kWidth];
    float totals[kPixels][kWidth] = {};
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      for (T& value : own[p]) value = from_float<T>(0.0f);
      for (T& value : together[p]) value = from_float<T>(0.0f);
      if (pixel + p >= end) continue;
      if (tensors.grad_scale) {
        load(own[p], static_cast<const T*>(tensors.input) + place.sample * problem.input.batch +
                         offset_of(problem, problem.input, pixel + p) + place.channel);
      }
      if (neighbours) {
        load(together[p], gradients + offset_of(problem, problem.output, pixel + p) + first_reader);
      }
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      for (int32_t r = starts[e]; r < starts[e + 1]; ++r) {
        const int64_t reader = readers[r];
        const float factor = factor_of<T>(tensors.scale, entries + reader);
        float sum = 0;
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
          if (pixel + p >= end) continue;
          T gradient = together[p][e];
          if (!neighbours) {
            gradient = gradients[offset_of(problem, problem.output, pixel + p) + reader];
          }
          totals[p][e] += factor * to_float(gradient);
          sum += to_float(gradient) * to_float(own[p][e]);
        }
        if (tensors.grad_scale) sums[reader] = sum + (pixel > place.first ? sums[reader] : 0.0f);
      }
    }
    if (!tensors.grad_input) continue;
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      if (pixel + p >= end) continue;
      T values[kWidth];
      for (int e = 0; e < kWidth; ++e) values[e] = from_float<T>(totals[p][e]);
      store(static_cast<T*>(tensors.grad_input) + place.sample * problem.grad_input.batch +
                offset_of(problem, problem.grad_input, pixel + p) + place.channel,
            values);
    }
  }
}

// A thread for each input channel, and one for the end of the last one's readers.
__global__ void __launch_bounds__(kThreads) inverse_kernel(Kernel kernel) {
  const Problem& problem = kernel.problem;
  const int64_t blocks = (problem.input_channels + kThreads) / kThreads;
  const int64_t map = blockIdx.x / blocks;
  const int64_t channel = (blockIdx.x - map * blocks) * kThreads + threadIdx.x;
  if (channel > problem.input_channels) return;
  const int64_t* index = kernel.backward.index + map * problem.output_channels;
  const int32_t outputs = static_cast<int32_t>(problem.output_channels);
  int32_t place = 0;
#pragma unroll 8
  for (int32_t c = 0; c < outputs; ++c) place += index[c] < channel;
  kernel.starts[map * (problem.input_channels + 1) + channel] = place;
  if (channel == problem.input_channels) return;
  int32_t* readers = kernel.readers + map * problem.output_channels;
#pragma unroll 8
  for (int32_t c = 0; c < outputs; ++c) {
    if (index[c] == channel) readers[place++] = c;
  }
}

// grad_scale[map][channel]: kSummed channels a block, the parts divided among its warps.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_kernel(Kernel kernel) {
  __shared__ float totals[kWarps][kSummed];
  const Problem& problem = kernel.problem;
  const int64_t blocks = (problem.output_channels + kSummed - 1) / kSummed;
  const int64_t map = blockIdx.x / blocks;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t channel = (blockIdx.x - map * blocks) * kSummed + lane;
  const int64_t count = problem.samples * kernel.parts;
  float total = 0;
  if (channel < problem.output_channels) {
#pragma unroll 8
    for (int64_t part = warp; part < count; part += kWarps) {
      total += kernel.sums[(map * count + part) * problem.output_channels + channel];
    }
  }
  totals[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || channel >= problem.output_channels) return;
  for (int w = 1; w < kWarps; ++w) total += totals[w][lane];
  const int64_t entry = map * problem.output_channels + channel;
  const int64_t source = kernel.backward.index[entry];
  const bool inside = source >= 0 && source < problem.input_channels;
  static_cast<T*>(kernel.backward.grad_scale)[entry] = from_float<T>(inside ? total : NAN);
}

template <typename Function>
const char* with_element(DType dtype, Function function) {
  switch (dtype) {
    case DType::float32:
      return function(float{});
    case DType::float16:
      return function(__half{});
    case DType::bfloat16:
      return function(__nv_bfloat16{});
  }
  return "unknown dtype";
}

int vector_of(const Problem& problem) { return problem.dtype == DType::float32 ? 4 : 8; }

bool aligned(const void* data, const Strides& strides, bool channels_last, int vector) {
  if (data == nullptr) return true;
  const int64_t other = channels_last ? strides.column : strides.channel;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.batch % vector == 0 &&
         strides.row % vector == 0 && other % vector == 0;
}

// `channels` are those that a launch walks over.
void plan(Kernel& kernel, bool vectors, int64_t channels) {
  const Problem& problem = kernel.problem;
  const int width = vectors ? vector_of(problem) : 1;
  const int64_t pixels = problem.rows * problem.columns;
  if (!problem.channels_last) {
    kernel.per_plane = divide_up(pixels, int64_t{width} * kUnits * kThreads);
    kernel.parts = kernel.per_plane * kWarps;
    return;
  }
  const int64_t across = divide_up(channels, width);
  for (kernel.lane_bits = 0; (1 << kernel.lane_bits) < std::min<int64_t>(across, kThreads);) {
    ++kernel.lane_bits;
  }
  kernel.lanes = 1 << kernel.lane_bits;
  kernel.across = divide_up(across, kernel.lanes);
  kernel.parts = divide_up(pixels, kBatches * kPixels);
  kernel.per_plane = divide_up(kernel.parts, kThreads / kernel.lanes);
}

int64_t most_parts(const Problem& problem) {
  const int64_t pixels = problem.rows * problem.columns;
  if (problem.channels_last) return divide_up(pixels, kBatches * kPixels);
  return divide_up(pixels, int64_t{kUnits} * kThreads) * kWarps;  // of single elements
}

bool whole_vectors(const Problem& problem) {
  const int vector = vector_of(problem);
  if (!problem.channels_last) return problem.columns % vector == 0;
  return problem.input_channels % vector == 0 && problem.output_channels % vector == 0;
}

int64_t inverse_words(const Problem& problem) {
  return problem.maps * (problem.input_channels + 1 + problem.output_channels);
}

}  // namespace

int64_t workspace_words(const Problem& problem) {
  return inverse_words(problem) +
         problem.maps * problem.samples * most_parts(problem) * problem.output_channels;
}

const char* forward(const Problem& problem, const Forward& arguments, void* stream) {
  Kernel kernel{};
  kernel.problem = problem;
  kernel.forward = arguments;
  const int vector = vector_of(problem);
  const bool last = problem.channels_last;
  const bool vectors = whole_vectors(problem) &&
                       aligned(arguments.input, problem.input, last, vector) &&
                       aligned(arguments.output, problem.output, last, vector);
  plan(kernel, vectors, problem.output_channels);
  const int64_t samples = problem.maps * problem.samples;
  return with_element(problem.dtype, [&](auto element) {
    using T = decltype(element);
    if (last) {
      return launch(vectors ? forward_pixels_kernel<T, kVector<T>> : forward_pixels_kernel<T, 1>,
                    samples * kernel.per_plane * kernel.across, kThreads, 0, stream, kernel);
    }
    return launch(vectors ? forward_planes_kernel<T, kVector<T>> : forward_planes_kernel<T, 1>,
                  samples * problem.output_channels * kernel.per_plane, kThreads, 0, stream,
                  kernel);
  });
}

const char* backward(const Problem& problem, const Backward& arguments, void* stream) {
  Kernel kernel{};
  kernel.problem = problem;
  kernel.backward = arguments;
  kernel.starts = static_cast<int32_t*>(arguments.workspace);
  kernel.readers = kernel.starts + problem.maps * (problem.input_channels + 1);
  kernel.sums = static_cast<float*>(arguments.workspace) + inverse_words(problem);
  const int vector = vector_of(problem);
  const bool last = problem.channels_last;
  const void* input = arguments.grad_scale ? arguments.input : nullptr;
  const bool vectors = whole_vectors(problem) &&
                       aligned(arguments.grad_output, problem.output, last, vector) &&
                       aligned(input, problem.input, last, vector) &&
                       aligned(arguments.grad_input, problem.grad_input, last, vector);
  plan(kernel, vectors, problem.input_channels);
  const int64_t samples = problem.maps * problem.samples;
  const int64_t inverse_blocks = problem.maps * divide_up(problem.input_channels + 1, kThreads);
  if (const char* error = launch(inverse_kernel, inverse_blocks, kThreads, 0, stream, kernel)) {
    return error;
  }
  return with_element(problem.dtype, [&](auto element) {
    using T = decltype(element);
    const char* error =
        last
            ? launch(vectors ? backward_pixels_kernel<T, kVector<T>> : backward_pixels_kernel<T, 1>,
                     samples * kernel.per_plane * kernel.across, kThreads, 0, stream, kernel)
            : launch(vectors ? backward_planes_kernel<T, kVector<T>> : backward_planes_kernel<T, 1>,
                     samples * problem.input_channels * kernel.per_plane, kThreads, 0, stream,
                     kernel);
    if (error || !arguments.grad_scale) return error;
    return launch(sum_kernel<T>, problem.maps * divide_up(problem.output_channels, kSummed),
                  kThreads, 0, stream, kernel);
  });
}

}  // namespace vfmk::channel_remap::cuda
