// Depthwise convolution with a kernel for each sample, forward and fused backward.
//
// k = 3, 5, 7 (square, dilation 1). A block owns a tile of rows x columns positions of a few
// channels and keeps two tiles in shared memory, one plane for each channel whatever the layout
// outside:
//
//              window (with a halo of k - 1)      centre (no halo)
//   forward    input, read                        output, written
//   backward   grad_output, read                  input, read; overwritten by grad_input; written
//
// and everything is a correlation between the two:
//
//   forward       output[y,x]     = sum over i,j of weight[i,j] * window[y+i, x+j]     (+ bias)
//   grad_input    the same, with the kernel rotated by 180 degrees
//   grad_weight   rotated[i,j]    = sum over y,x of centre[y,x] * window[y+i, x+j]
//   grad_bias     the same at i = j = k/2, with ones as the centre
//
// so each tensor crosses the bus once, halos aside (those hit the L2 cache: the neighbouring tile
// runs at about the same time): 2N elements forward and 3N backward, the floor.
//
// 16-bit elements go to the tensor cores: k^2 fp32 multiply-adds for each output, and a conversion
// for each operand, would take longer than the memory does. Sixteen window columns times a banded
// 16 x 8 matrix made of one kernel row give that row's share of 8 outputs: the shift between
// columns is in the band, the shift between rows in the address. For grad_weight, 16 window columns
// times 8 centre columns, summed over rows, hold the taps of one kernel row on the diagonals m - n
// = const. Rows go in pairs: a window row that serves kernel row i for the even row of a pair
// serves i - 1 for the odd one, so it is loaded once for both. The band's zeros are multiplied too:
// an infinity or NaN reaches outputs up to 11 columns away.
//
// fp32 stays on the FMA units: a thread computes 4 x 4 outputs from rows of 12 loaded values.
//
// Registers hold the band (2k) and, of each of k + 1 window rows, the columns shared with the next
// outputs; for grad_weight k + 1 accumulators of 4; for fp32 a kernel and a 4 x 4 cell. Shared
// memory holds the tiles. A tile's sums of grad_weight and grad_bias go through the fp32 workspace
// if a plane has several tiles or samples share a kernel, and are added in a fixed order: no
// atomics, the same bits on each run.
//
// Any other kernel goes to the plain loops further down: right, not fast.
#include <algorithm>
#include <initializer_list>
#include <utility>

#include "../dynamic_depthwise_conv2d.h"
#include "launch.h"
#include "planes.h"

namespace vfmk::dynamic_depthwise_conv2d::cuda {
namespace {

using namespace vfmk::cuda;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kStep = 16;   // rows and columns of the matrix instructions' share of a tile
constexpr int kMargin = 8;  // window columns beyond a tile's own: 16 for each 8 outputs
constexpr int kRowsChannelsLast = 16, kColumnsChannelsLast = 32;  // of every such tile
constexpr int kCopyWidth = 4;  // elements of one asynchronous copy

// Lanes that hold different channel vectors of one pixel then meet different banks.
template <typename T>
constexpr int kPadding = sizeof(T) == 2 ? 32 : 4;

// With padding "same", window column 0 then lies 4 columns left of the tile: still aligned for
// copies of 4 elements. The first `lead` columns and the last are nobody's.
__host__ __device__ constexpr int lead(int kernel) { return kMargin / 2 - kernel / 2; }

struct Tiling {
  int rows, columns, channels;  // of a tile: multiples of kStep, and a power of two
  int run;                      // tiles, one below the other, that one block does in turn
  int runs_down, tiles_across, channel_groups;
};

struct Bounds {  // of the positions that the tiles cover
  int top, left, bottom, right;
};

// Of a block's shared memory, in bytes from its beginning.
struct SharedLayout {
  int channel_bits, slice_bits, row_slice_bits;  // 1 << of channels, and of warps that share one
  int centre, weight, partials, bias, origin, end;
};

struct Arguments {
  Problem problem;
  View window, centre, result;  // centre: backward only; result: output or grad_input, or null
  int offset_y, offset_x;       // from a position to the first window row and column it meets
  bool rotate;                  // correlate with the kernel rotated by 180 degrees
  const void *weight, *bias;
  void *grad_weight, *grad_bias;
  float* workspace;  // [tile, sample, channel, taps + 1]; null: a tile's sums are the gradients
  Bounds bounds;
  Tiling tiling;
  Divisor tiles, tiles_across, groups;
  SharedLayout layout;
};

// How far apart a kernel's rows lie in shared memory, and where its taps begin. For the tensor
// cores there are zeros between them, so that a lane reads its part of the band without asking
// whether it lies inside; the last row is followed by one of zeros.
__host__ __device__ constexpr int tap_row(int kernel, int element_size) {
  return element_size == 2 ? 16 : kernel;
}
__host__ __device__ constexpr int first_tap(int kernel, int element_size) {
  return element_size == 2 ? 7 + lead(kernel) : 0;
}

// A warp's part of one channel: slice `slice` of 1 << `slice_bits`, of which 1 << `row_slice_bits`
// share the rows and the rest the columns.
struct Share {
  int slice, slice_bits, row_slice_bits, rows, columns;
};

// The part as the tensor cores take it: every `row_step`-th row, and columns in units of kStep.
struct Steps {
  int first_row, row_step, first, end;

  __device__ explicit Steps(const Share& share)
      : first_row((share.slice & ((1 << share.row_slice_bits) - 1)) * kStep),
        row_step(kStep << share.row_slice_bits) {
    const int part = share.slice >> share.row_slice_bits;
    const int part_bits = share.slice_bits - share.row_slice_bits;
    const int across = (share.columns + kStep - 1) / kStep;
    first = part * across >> part_bits, end = (part + 1) * across >> part_bits;
  }
};

// The 16 x 16 left matrix of one window row in every two: 8 columns and the 8 after them for the
// first half of its rows, and for the second half the same 8 columns further on. Moving on by 16
// columns keeps the last 8.
template <bool kTransposed>
struct Window {
  uint32_t left[4];

  __device__ void start(SharedAddress row) {
    uint32_t matrix[1];
    load_matrices<kTransposed>(matrix, row);
    left[3] = matrix[0];
  }
  __device__ void advance(SharedAddress next_columns) {
    uint32_t matrices[2];
    load_matrices<kTransposed>(matrices, next_columns);
    left[0] = left[3], left[1] = left[2] = matrices[0], left[3] = matrices[1];
  }
};

// centre[y,x] = bias + sum over i,j of weight[i,j] * window[y+i, lead+x+j], on the tensor cores.
template <int K, typename T>
__device__ void correlate(const Planes<T>& window, const Planes<T>& centre, int channel,
                          const Share& share, const T* weight, float bias) {
  const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
  const int row_bytes = window.pitch * sizeof(T), odd_bytes = window.rows / 2 * row_bytes;
  const Steps steps(share);
  if (steps.first == steps.end) return;

  uint32_t band[K][2];  // right[m][n] = weight[i, m - n - lead], rows m = pair + 8 * half and m + 1
#pragma unroll
  for (int i = 0; i < K; ++i) {
    const T* own = weight + i * tap_row(K, sizeof(T)) + 7 + pair - group;
    band[i][0] = pack(own[0], own[1]), band[i][1] = pack(own[8], own[9]);
  }

  // Matrices of one load: 8 rows of 8 columns, then of the next 8 columns.
  const SharedAddress source =
      shared_address(window.channel(channel) + lane / 8 % 2 * 8 + steps.first * kStep) +
      lane % 8 * row_bytes;
  T* target = centre.channel(channel) + group * centre.pitch + pair + steps.first * kStep;
  for (int row = steps.first_row; row < share.rows; row += steps.row_step) {
    SharedAddress from = source + row / 2 * row_bytes;
    T* even = target + row / 2 * centre.pitch;
    T* odd = even + centre.rows / 2 * centre.pitch;
    Window<false> rows[K + 1];
#pragma unroll
    for (int p = 0; p <= K; ++p) rows[p].start(from + p / 2 * row_bytes + p % 2 * odd_bytes);
#pragma unroll 1
    for (int step = steps.first; step < steps.end; ++step) {
      float sums[2][4] = {{bias, bias, bias, bias}, {bias, bias, bias, bias}};  // even, odd rows
#pragma unroll
      for (int p = 0; p <= K; ++p) {
        rows[p].advance(from + p / 2 * row_bytes + p % 2 * odd_bytes + 8 * sizeof(T));
        if (p < K) multiply_add<T>(sums[0], rows[p].left, band[p][0], band[p][1]);
        if (p > 0) multiply_add<T>(sums[1], rows[p].left, band[p - 1][0], band[p - 1][1]);
      }
      *reinterpret_cast<uint32_t*>(even) = pack_floats<T>(sums[0][0], sums[0][1]);
      *reinterpret_cast<uint32_t*>(even + 8) = pack_floats<T>(sums[0][2], sums[0][3]);
      *reinterpret_cast<uint32_t*>(odd) = pack_floats<T>(sums[1][0], sums[1][1]);
      *reinterpret_cast<uint32_t*>(odd + 8) = pack_floats<T>(sums[1][2], sums[1][3]);
      from += kStep * sizeof(T), even += kStep, odd += kStep;
    }
  }
}

// gradient[rotated i,j] = sum over y,x of centre[y,x] * window[y+i, lead+x+j], and the bias's at
// K * K; added to what stands there if `add`. All lanes of the warp take part.
template <int K, typename T>
__device__ void correlate_weight(const Planes<T>& window, const Planes<T>& centre, int channel,
                                 const Share& share, bool want_weight, bool want_bias, bool add,
                                 float* gradient) {
  const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
  const int row_bytes = window.pitch * sizeof(T), odd_bytes = window.rows / 2 * row_bytes;
  const Steps steps(share);
  const T one = from_float<T>(1.0f);
  const uint32_t ones = pack(one, one);

  float sums[K + 1][4] = {};  // [m][n]: sum over y of window[y+i, m] * centre[y, n]; last: bias
  const int corner = lane / 8 % 2 * 8 + steps.first * kStep;
  const SharedAddress source =
      shared_address(window.channel(channel) + corner) + lane % 8 * row_bytes;
  // Four matrices: the even rows of 8 columns and of the next 8, then the odd ones.
  const SharedAddress own_source = shared_address(centre.channel(channel) + corner) +
                                   (lane % 8 + lane / 16 * (centre.rows / 2)) * row_bytes;
  for (int row = steps.first_row; row < share.rows && steps.first < steps.end;
       row += steps.row_step) {
    SharedAddress from = source + row / 2 * row_bytes, own_from = own_source + row / 2 * row_bytes;
    Window<true> rows[K + 1];
#pragma unroll
    for (int p = 0; p <= K; ++p) rows[p].start(from + p / 2 * row_bytes + p % 2 * odd_bytes);
#pragma unroll 1
    for (int step = steps.first; step < steps.end; ++step) {
      uint32_t own[4];
      load_matrices<true>(own, own_from);
#pragma unroll
      for (int p = 0; p <= K; ++p) {
        rows[p].advance(from + p / 2 * row_bytes + p % 2 * odd_bytes + 8 * sizeof(T));
        if (want_weight && p < K) multiply_add<T>(sums[p], rows[p].left, own[0], own[1]);
        if (want_weight && p > 0) multiply_add<T>(sums[p - 1], rows[p].left, own[2], own[3]);
        if (want_bias && (p == K / 2 || p == K / 2 + 1)) {
          multiply_add<T>(sums[K], rows[p].left, ones, ones);
        }
      }
      from += kStep * sizeof(T), own_from += kStep * sizeof(T);
    }
  }

  // Brings the elements with m - n = d to the lanes of group d: each lane sends, of its two rows m
  // and m + 8 of one column, the one that lies on a diagonal 0 <= d < 8.
  float diagonal[K + 1];
#pragma unroll
  for (int i = 0; i <= K; ++i) {
    const float even = group >= pair ? sums[i][0] : sums[i][2];
    const float odd = group >= pair + 1 ? sums[i][1] : sums[i][3];
    diagonal[i] = __shfl_sync(~0u, even, (group + pair) % 8 * 4 + lane % 4) +
                  __shfl_sync(~0u, odd, (group + pair + 1) % 8 * 4 + lane % 4);
    diagonal[i] += __shfl_xor_sync(~0u, diagonal[i], 1);
    diagonal[i] += __shfl_xor_sync(~0u, diagonal[i], 2);
  }
  const int j = group - lead(K);
  if (pair != 0 || j < 0 || j >= K) return;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    float& entry = gradient[K * K - 1 - (i * K + j)];
    entry = (add ? entry : 0.0f) + diagonal[i];
  }
  if (j == K / 2) gradient[K * K] = (add ? gradient[K * K] : 0.0f) + diagonal[K];
}

constexpr int kCell = 4;  // fp32: rows and columns of a thread's share
constexpr int kCellWindow = kCell + kMargin;

__device__ inline void load_row(float (&row)[kCellWindow], const float* from) {
#pragma unroll
  for (int n = 0; n < kCellWindow; n += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + n);
    row[n] = four.x, row[n + 1] = four.y, row[n + 2] = four.z, row[n + 3] = four.w;
  }
}

template <int K>
__device__ void correlate(const Planes<float>& window, const Planes<float>& centre, int channel,
                          const Share& share, const float* weight, float bias) {
  const int across = (share.columns + kCell - 1) / kCell;
  const int cells = (share.rows + kCell - 1) / kCell * across;
  const int odd_window = window.rows / 2, odd_centre = centre.rows / 2;
  float taps[K][K];
#pragma unroll
  for (int n = 0; n < K * K; ++n) taps[n / K][n % K] = weight[n];

#pragma unroll 1
  for (int cell = share.slice * 32 + threadIdx.x % 32; cell < cells;
       cell += 32 << share.slice_bits) {
    const int offset = cell / across * (kCell / 2) * window.pitch + cell % across * kCell;
    const float* from = window.channel(channel) + offset;
    float* to = centre.channel(channel) + offset;
    float sums[kCell][kCell];
#pragma unroll
    for (int n = 0; n < kCell * kCell; ++n) sums[n / kCell][n % kCell] = bias;
#pragma unroll
    for (int y = 0; y < kCell + K - 1; ++y) {
      float row[kCellWindow];
      load_row(row, from + (y / 2 + y % 2 * odd_window) * window.pitch);
#pragma unroll
      for (int i = 0; i < K; ++i) {
        if (y - i < 0 || y - i >= kCell) continue;
#pragma unroll
        for (int j = 0; j < K; ++j) {
#pragma unroll
          for (int x = 0; x < kCell; ++x) sums[y - i][x] += taps[i][j] * row[lead(K) + x + j];
        }
      }
    }
#pragma unroll
    for (int y = 0; y < kCell; ++y) {
      *reinterpret_cast<float4*>(to + (y / 2 + y % 2 * odd_centre) * centre.pitch) =
          make_float4(sums[y][0], sums[y][1], sums[y][2], sums[y][3]);
    }
  }
}

template <int K>
__device__ void correlate_weight(const Planes<float>& window, const Planes<float>& centre,
                                 int channel, const Share& share, bool want_weight, bool want_bias,
                                 bool add, float* gradient) {
  const int across = (share.columns + kCell - 1) / kCell;
  const int cells = (share.rows + kCell - 1) / kCell * across;
  const int odd_window = window.rows / 2, odd_centre = centre.rows / 2;
  float sums[K][K] = {}, bias_sum = 0.0f;
#pragma unroll 1
  for (int cell = share.slice * 32 + threadIdx.x % 32; cell < cells;
       cell += 32 << share.slice_bits) {
    const int offset = cell / across * (kCell / 2) * window.pitch + cell % across * kCell;
    const float* from = window.channel(channel) + offset;
    const float* own_from = centre.channel(channel) + offset;
    float own[kCell][kCell];
#pragma unroll
    for (int y = 0; y < kCell; ++y) {
      const float4 four =
          *reinterpret_cast<const float4*>(own_from + (y / 2 + y % 2 * odd_centre) * centre.pitch);
      own[y][0] = four.x, own[y][1] = four.y, own[y][2] = four.z, own[y][3] = four.w;
    }
#pragma unroll
    for (int y = 0; y < kCell + K - 1; ++y) {
      float row[kCellWindow];
      load_row(row, from + (y / 2 + y % 2 * odd_window) * window.pitch);
#pragma unroll
      for (int i = 0; i < K; ++i) {
        if (y - i < 0 || y - i >= kCell) continue;
#pragma unroll
        for (int x = 0; x < kCell; ++x) {
          if (want_bias && i == K / 2) bias_sum += row[kMargin / 2 + x];
          if (!want_weight) continue;
#pragma unroll
          for (int j = 0; j < K; ++j) sums[i][j] += own[y - i][x] * row[lead(K) + x + j];
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n <= K * K; ++n) {
    float sum = n == K * K ? bias_sum : sums[n / K][n % K];
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    float& entry = gradient[n == K * K ? n : K * K - 1 - n];
    if (threadIdx.x % 32 == 0) entry = (add ? entry : 0.0f) + sum;
  }
}

// Entry `entry` of plane `plane`: grad_weight's taps, then grad_bias. Either may be unwanted.
template <typename T>
__device__ void write_gradient(const Arguments& arguments, int64_t plane, int taps, int entry,
                               float sum) {
  if (entry < taps && arguments.grad_weight) {
    static_cast<T*>(arguments.grad_weight)[plane * taps + entry] = from_float<T>(sum);
  }
  if (entry == taps && arguments.grad_bias) {
    static_cast<T*>(arguments.grad_bias)[plane] = from_float<T>(sum);
  }
}

// Where a block begins. Neighbouring blocks share halos, or the other channels of the same pixels.
struct Origin {
  int tile, sample, channel, channels, row, column;
};

template <bool kChannelsLast>
__device__ Origin origin_of(const Arguments& arguments, int rows, int columns, uint32_t block) {
  uint32_t tile, group, sample = block;
  if constexpr (kChannelsLast) {
    group = sample, sample = arguments.groups.divide(group);
    tile = sample, sample = arguments.tiles.divide(tile);
  } else {
    tile = sample, sample = arguments.tiles.divide(tile);
    group = sample, sample = arguments.groups.divide(group);
  }
  uint32_t across = tile;
  const int down = arguments.tiles_across.divide(across);
  const int channel = group * arguments.tiling.channels;
  return {static_cast<int>(tile),
          static_cast<int>(sample),
          channel,
          min(arguments.tiling.channels, static_cast<int>(arguments.problem.channels) - channel),
          arguments.bounds.top + down * rows * arguments.tiling.run,
          arguments.bounds.left + static_cast<int>(across) * columns};
}

// The first plane of a block's, in what samples share or not.
__device__ inline int64_t plane_of(const Origin& origin, const Problem& problem, bool shared) {
  return (shared ? 0 : origin.sample * problem.channels) + origin.channel;
}

// Blocks of one multiprocessor that the registers must leave room for.
template <typename T, bool kBackward, bool kChannelsLast>
constexpr int kResident = sizeof(T) == 4 || kBackward || kChannelsLast ? 4 : 5;

template <typename T, int K, bool kBackward, bool kChannelsLast>
__global__ __launch_bounds__(kThreads, (kResident<T, kBackward, kChannelsLast>)) void tile_kernel(
    const __grid_constant__ Arguments arguments) {
  constexpr int kTaps = K * K;
  VFMK_DYNAMIC_SHARED(uint4, shared);
  char* const memory = reinterpret_cast<char*>(shared);
  const Problem& problem = arguments.problem;
  const Tiling& tiling = arguments.tiling;
  const SharedLayout& layout = arguments.layout;
  const int rows = kChannelsLast ? kRowsChannelsLast : tiling.rows;
  const int columns = kChannelsLast ? kColumnsChannelsLast : tiling.columns;
  const int pitch = columns + kMargin, padding = kChannelsLast ? kPadding<T> : 0;
  const Planes<T> window{reinterpret_cast<T*>(memory), rows + K - 1, pitch, pitch,
                         (rows + K - 1) * pitch,       padding};
  const Planes<T> centre{
      reinterpret_cast<T*>(memory + layout.centre), rows, columns, pitch, rows * pitch, padding};
  float* const partials = reinterpret_cast<float*>(memory + layout.partials);
  T* const weight = reinterpret_cast<T*>(memory + layout.weight);
  T* const bias = reinterpret_cast<T*>(memory + layout.bias);

  // In shared memory, where it takes no registers.
  Origin& origin = *reinterpret_cast<Origin*>(memory + layout.origin);
  if (threadIdx.x == 0) origin = origin_of<kChannelsLast>(arguments, rows, columns, blockIdx.x);
  __syncthreads();

  if (arguments.result.data) {
    constexpr int kRow = tap_row(K, sizeof(T)), kFirst = first_tap(K, sizeof(T));
    const T* source = static_cast<const T*>(arguments.weight) +
                      plane_of(origin, problem, problem.shared_weight) * kTaps;
#pragma unroll 1
    for (int n = threadIdx.x; n <= origin.channels * K; n += kThreads) {
      if constexpr (kRow > K) {
        uint4* zeros = reinterpret_cast<uint4*>(weight + n * kRow);
        zeros[0] = zeros[1] = make_uint4(0, 0, 0, 0);
      }
      if (n == origin.channels * K) break;
      const int kernel = n / K * kTaps, tap = n % K * K;
#pragma unroll
      for (int j = 0; j < K; ++j) {
        weight[n * kRow + kFirst + j] =
            source[kernel + (arguments.rotate ? kTaps - 1 - (tap + j) : tap + j)];
      }
    }
  }
  if (arguments.bias && static_cast<int>(threadIdx.x) < origin.channels) {
    bias[threadIdx.x] = static_cast<const T*>(
        arguments.bias)[plane_of(origin, problem, problem.shared_bias) + threadIdx.x];
  }

  // A channels-last tile has at least a channel vector's worth of planes: one warp for each.
  static_assert(kVector<T> >= kWarps);
  const int slice_bits = kChannelsLast ? 0 : layout.slice_bits;
  const int row_slice_bits = kChannelsLast ? 0 : layout.row_slice_bits;
  const int warp = threadIdx.x / 32, slices = 1 << slice_bits;
#pragma unroll 1
  for (int step = 0; step < tiling.run; ++step) {
    const int y = origin.row + step * rows;
    if (y >= arguments.bounds.bottom) break;
    if (step > 0) __syncthreads();  // all of the tile before is stored
    Place place{origin.sample, origin.channel, origin.channels, layout.channel_bits};
    place.row = y + arguments.offset_y;
    place.column = origin.column + arguments.offset_x - lead(K);
    load_planes<kChannelsLast, kCopyWidth, kThreads>(window, arguments.window, place, lead(K));
    place.row = y, place.column = origin.column;
    if constexpr (kBackward) {
      load_planes<kChannelsLast, kVector<T>, kThreads>(centre, arguments.centre, place, 0);
    }
    wait_for_copies();
    __syncthreads();

    const Share share{warp & (slices - 1), slice_bits, row_slice_bits,
                      min(rows, arguments.bounds.bottom - y),
                      min(columns, arguments.bounds.right - origin.column)};
    const int first = warp >> slice_bits, every = kWarps >> slice_bits;
    if constexpr (kBackward) {
#pragma unroll 1
      for (int channel = first; channel < origin.channels; channel += every) {
        correlate_weight<K>(window, centre, channel, share, arguments.grad_weight,
                            arguments.grad_bias, step > 0,
                            partials + (share.slice * tiling.channels + channel) * (kTaps + 1));
      }
      __syncwarp();  // the warp is done with its part of the centre, which it now overwrites
    }
    if (arguments.result.data) {
#pragma unroll 1
      for (int channel = first; channel < origin.channels; channel += every) {
        correlate<K>(window, centre, channel, share, weight + channel * K * tap_row(K, sizeof(T)),
                     arguments.bias ? to_float(bias[channel]) : 0.0f);
      }
    }
    __syncthreads();

    if (arguments.result.data) {
      store_planes<kChannelsLast, kThreads>(
          centre, arguments.result,
          {origin.sample, origin.channel, origin.channels, layout.channel_bits,
           origin.row + step * rows, origin.column});
    }
  }

  if constexpr (kBackward) {
    const int64_t plane = plane_of(origin, problem, false);
    const int64_t first = origin.tile * problem.batch * problem.channels + plane;
#pragma unroll 1
    for (int n = threadIdx.x; n < origin.channels * (kTaps + 1); n += kThreads) {
      float sum = 0.0f;
#pragma unroll 1
      for (int slice = 0; slice < slices; ++slice) {
        sum += partials[slice * tiling.channels * (kTaps + 1) + n];
      }
      if (arguments.workspace) {
        arguments.workspace[first * (kTaps + 1) + n] = sum;
      } else {
        write_gradient<T>(arguments, plane + n / (kTaps + 1), kTaps, n % (kTaps + 1), sum);
      }
    }
  }
}

// One thread for each entry of the gradients: adds tiles, and samples where they share, in order.
template <typename T>
__global__ __launch_bounds__(kThreads) void sum_kernel(
    const __grid_constant__ Arguments arguments) {
  const Problem& problem = arguments.problem;
  const int tiles = arguments.tiling.runs_down * arguments.tiling.tiles_across;
  const int taps = problem.kernel_height * problem.kernel_width;
  const int64_t entries = problem.channels * (taps + 1);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t sample = index / entries, channel = index % entries / (taps + 1);
  const int entry = index % (taps + 1);
  const bool shared = entry == taps ? problem.shared_bias : problem.shared_weight;
  if (sample >= (shared ? 1 : problem.batch)) return;

  float sum = 0.0f;
  for (int64_t b = sample; b < (shared ? problem.batch : sample + 1); ++b) {
    for (int tile = 0; tile < tiles; ++tile) {
      sum += arguments.workspace[(tile * problem.batch + b) * entries + index % entries];
    }
  }
  write_gradient<T>(arguments, sample * problem.channels + channel, taps, entry, sum);
}

// Output or grad_input for any kernel: one thread for each element, neighbours in memory.
template <typename T>
__global__ __launch_bounds__(kThreads) void plain_kernel(
    const __grid_constant__ Arguments arguments) {
  const Problem& problem = arguments.problem;
  const View &window = arguments.window, &result = arguments.result;
  int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const auto next = [&](int64_t size) {
    const int64_t coordinate = index % size;
    index /= size;
    return coordinate;
  };
  int64_t channel = problem.channels_last ? next(problem.channels) : 0;
  const int64_t x = next(result.width), y = next(result.height);
  if (!problem.channels_last) channel = next(problem.channels);
  const int64_t sample = index;
  if (sample >= problem.batch) return;

  const int taps = problem.kernel_height * problem.kernel_width;
  const int64_t plane = sample * problem.channels + channel;
  const T* weight =
      static_cast<const T*>(arguments.weight) + (problem.shared_weight ? channel : plane) * taps;
  const T* source = static_cast<const T*>(window.data) + sample * window.strides.batch +
                    channel * window.strides.channel;
  float sum = 0.0f;
  if (arguments.bias) {
    sum = to_float(static_cast<const T*>(arguments.bias)[problem.shared_bias ? channel : plane]);
  }
  for (int i = 0; i < problem.kernel_height; ++i) {
    const int64_t row = y + arguments.offset_y + int64_t{i} * problem.dilation_height;
    if (row < 0 || row >= window.height) continue;
    for (int j = 0; j < problem.kernel_width; ++j) {
      const int64_t column = x + arguments.offset_x + int64_t{j} * problem.dilation_width;
      if (column < 0 || column >= window.width) continue;
      const int tap = i * problem.kernel_width + j;
      sum += to_float(weight[arguments.rotate ? taps - 1 - tap : tap]) *
             to_float(source[row * window.strides.row + column * window.strides.column]);
    }
  }
  static_cast<T*>(result.data)[sample * result.strides.batch + channel * result.strides.channel +
                               y * result.strides.row + x * result.strides.column] =
      from_float<T>(sum);
}

// One block for each entry of grad_weight, then of grad_bias, for any kernel. The window is
// grad_output, the centre input.
template <typename T>
__global__ __launch_bounds__(kThreads) void plain_weight_kernel(
    const __grid_constant__ Arguments arguments) {
  __shared__ float warp_sums[kWarps];
  const Problem& problem = arguments.problem;
  const View &window = arguments.window, &centre = arguments.centre;
  const int batch = problem.batch, channels = problem.channels;
  const int taps = problem.kernel_height * problem.kernel_width;
  const int weights =
      arguments.grad_weight ? (problem.shared_weight ? 1 : batch) * channels * taps : 0;
  const int block = blockIdx.x;
  const bool is_bias = block >= weights;
  const int entry = is_bias ? block - weights : block;
  const int plane = is_bias ? entry : entry / taps, tap = is_bias ? 0 : entry % taps;
  const bool shared = is_bias ? problem.shared_bias : problem.shared_weight;
  const int first = shared ? 0 : plane / channels, channel = plane % channels;
  const int last = shared ? batch : first + 1;
  const int64_t shift_y =
      int64_t{tap / problem.kernel_width} * problem.dilation_height - problem.pad_top;
  const int64_t shift_x =
      int64_t{tap % problem.kernel_width} * problem.dilation_width - problem.pad_left;
  const T* grad_output = static_cast<const T*>(window.data) + channel * window.strides.channel;
  const T* input = static_cast<const T*>(centre.data) + channel * centre.strides.channel;

  float sum = 0.0f;
  for (int sample = first; sample < last; ++sample) {
    for (int row = threadIdx.x / 32; row < window.height; row += kWarps) {
      const int64_t y = row + shift_y;
      if (!is_bias && (y < 0 || y >= centre.height)) continue;
      const T* gradients = grad_output + sample * window.strides.batch + row * window.strides.row;
      const T* inputs = input + sample * centre.strides.batch + y * centre.strides.row;
#pragma unroll 1
      for (int column = threadIdx.x % 32; column < window.width; column += 32) {
        const int64_t x = column + shift_x;
        if (!is_bias && (x < 0 || x >= centre.width)) continue;
        const float value = is_bias ? 1.0f : to_float(inputs[x * centre.strides.column]);
        sum += value * to_float(gradients[column * window.strides.column]);
      }
    }
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp];
  static_cast<T*>(is_bias ? arguments.grad_bias : arguments.grad_weight)[entry] =
      from_float<T>(sum);
}

int ceil_div(int value, int divisor) { return (value + divisor - 1) / divisor; }

int element_size(const Problem& problem) { return problem.dtype == DType::float32 ? 4 : 2; }

int64_t tiles(const Tiling& tiling) {
  return static_cast<int64_t>(tiling.runs_down) * tiling.tiles_across;
}

bool tiled(const Problem& problem) {
  const int kernel = problem.kernel_height;
  return kernel == problem.kernel_width && (kernel == 3 || kernel == 5 || kernel == 7) &&
         problem.dilation_height == 1 && problem.dilation_width == 1 && problem.batch > 0 &&
         problem.channels > 0 && problem.input_height > 0 && problem.input_width > 0 &&
         problem.output_height > 0 && problem.output_width > 0;
}

SharedLayout layout_of(const Tiling& tiling, const Problem& problem) {
  const int kernel = problem.kernel_height, size = element_size(problem);
  const int vectors = ceil_div(tiling.channels, 16 / size);
  SharedLayout layout;
  layout.channel_bits = layout.slice_bits = 0;
  while (1 << layout.channel_bits < tiling.channels) ++layout.channel_bits;
  while (tiling.channels << layout.slice_bits < kWarps) ++layout.slice_bits;
  layout.row_slice_bits = tiling.rows > kStep && layout.slice_bits > 0;
  const int row = tiling.channels * (tiling.columns + kMargin);
  const int paddings =
      problem.channels_last ? (vectors - 1) * (size == 2 ? kPadding<__half> : kPadding<float>) : 0;
  layout.centre = ((tiling.rows + kernel - 1) * row + paddings) * size;
  layout.weight = layout.centre + (tiling.rows * row + paddings) * size;
  layout.partials = layout.weight + (tiling.channels * kernel + 1) * tap_row(kernel, size) * size;
  layout.bias = layout.partials +
                (tiling.channels << layout.slice_bits) * (kernel * kernel + 1) * int{sizeof(float)};
  layout.origin = (layout.bias + tiling.channels * size + 3) / 4 * 4;
  layout.end = layout.origin + int{sizeof(Origin)};
  return layout;
}

Tiling choose_tiling(const Problem& problem, const Bounds& bounds) {
  // So that a multiprocessor of 228 KB holds six blocks, or four of the channels-last ones.
  constexpr int kSharedBytes = 37 * 1024, kSharedBytesChannelsLast = 56 * 1024;
  const int enough_blocks = 4 * multiprocessors();
  constexpr int kLongestRun = 8;
  constexpr int kSectorBytes = 32;  // of channels that a channels-last tile reads of a pixel

  const bool channels_last = problem.channels_last;
  const int size = element_size(problem);
  const int height = bounds.bottom - bounds.top, width = bounds.right - bounds.left;
  const auto balanced = [](int extent, int limit) {
    return ceil_div(ceil_div(extent, ceil_div(extent, limit)), kStep) * kStep;
  };
  Tiling tiling;
  tiling.run = 1;
  tiling.rows = channels_last ? kRowsChannelsLast : balanced(height, 32);
  tiling.columns = channels_last ? kColumnsChannelsLast : balanced(width, 512 / size);
  tiling.channels = channels_last ? kSectorBytes / size : 16;
  const int least_channels = channels_last ? 16 / size : 1;
  const auto halve = [](int& extent, int least) {
    if (extent / 2 < least) return false;
    extent /= 2;
    return true;
  };
  const auto blocks = [&] {
    tiling.runs_down = ceil_div(height, tiling.rows * tiling.run);
    tiling.tiles_across = ceil_div(width, tiling.columns);
    tiling.channel_groups = ceil_div(problem.channels, tiling.channels);
    return problem.batch * tiling.channel_groups * tiles(tiling);
  };
  const auto too_large = [&] {
    return layout_of(tiling, problem).end >
           (channels_last ? kSharedBytesChannelsLast : kSharedBytes);
  };
  while ((tiling.channels / 2 >= problem.channels || too_large()) &&
         halve(tiling.channels, least_channels)) {
  }
  while (blocks() < enough_blocks && (halve(tiling.channels, least_channels) ||
                                      (!channels_last && halve(tiling.rows, kStep)))) {
  }
  // Runs save workspace and the start of a block, while they leave several rounds of blocks.
  while (blocks() >= 8 * enough_blocks && tiling.runs_down > 1 && tiling.run < kLongestRun) {
    tiling.run *= 2;
  }
  return tiling;
}

// The positions of a backward pass: all of the input, and so much more that the window's centre
// meets each output once, for grad_bias.
Bounds backward_bounds(const Problem& problem) {
  const int shift_y = problem.kernel_height / 2 - problem.pad_top;
  const int shift_x = problem.kernel_width / 2 - problem.pad_left;
  return {std::min(0, shift_y), std::min(0, shift_x),
          std::max(problem.input_height, problem.output_height + shift_y),
          std::max(problem.input_width, problem.output_width + shift_x)};
}

// `column` is the view's under a tile's first, `copy` the elements of a vector in NCHW.
View make_view(const Problem& problem, const void* data, const Strides& strides, bool of_output,
               int column, int copy) {
  View view{const_cast<void*>(data), strides,
            of_output ? problem.output_height : problem.input_height,
            of_output ? problem.output_width : problem.input_width, Access::elements};
  const int size = element_size(problem);
  const int64_t batch = problem.batch > 1 ? strides.batch : 0;  // one sample: any stride
  const auto aligned = [&](int elements, std::initializer_list<int64_t> steps) {
    return reinterpret_cast<int64_t>(data) % (elements * size) == 0 &&
           std::all_of(steps.begin(), steps.end(),
                       [&](int64_t step) { return step % elements == 0; });
  };
  if (problem.channels_last) {
    if (strides.channel == 1 &&
        aligned(16 / size, {problem.channels, batch, strides.row, strides.column})) {
      view.access = Access::vectors;
    }
  } else if (strides.column == 1) {
    for (auto [elements, access] :
         {std::pair(4 / size, Access::words), std::pair(copy, Access::vectors)}) {
      if (aligned(elements, {column, view.width, batch, strides.channel, strides.row})) {
        view.access = access;
      }
    }
  }
  return view;
}

// A correlation that makes the output (of the input) or grad_input (of grad_output).
Arguments make_arguments(const Problem& problem, bool is_backward, const void* window,
                         const void* weight, const void* bias, void* result) {
  Arguments arguments{};
  arguments.problem = problem;
  arguments.rotate = is_backward;
  arguments.weight = weight;
  arguments.bias = bias;
  arguments.bounds = is_backward ? backward_bounds(problem)
                                 : Bounds{0, 0, problem.output_height, problem.output_width};
  arguments.offset_y = is_backward
                           ? problem.pad_top - (problem.kernel_height - 1) * problem.dilation_height
                           : -problem.pad_top;
  arguments.offset_x = is_backward
                           ? problem.pad_left - (problem.kernel_width - 1) * problem.dilation_width
                           : -problem.pad_left;
  const int left = arguments.bounds.left, vector = 16 / element_size(problem);
  arguments.window =
      make_view(problem, window, is_backward ? problem.output : problem.input, is_backward,
                left + arguments.offset_x - lead(problem.kernel_width), kCopyWidth);
  View& view = arguments.result;
  view = make_view(problem, result, is_backward ? problem.grad_input : problem.output, !is_backward,
                   left, vector);
  if (tiled(problem)) {
    arguments.tiling = choose_tiling(problem, arguments.bounds);
    arguments.tiles = Divisor(tiles(arguments.tiling));
    arguments.tiles_across = Divisor(arguments.tiling.tiles_across);
    arguments.groups = Divisor(arguments.tiling.channel_groups);
    arguments.layout = layout_of(arguments.tiling, problem);
  }
  return arguments;
}

template <typename Function>
const char* with_element(DType dtype, Function function) {
  switch (dtype) {
    case DType::float32:
      return function(float());
    case DType::float16:
      return function(__half());
    case DType::bfloat16:
      return function(__nv_bfloat16());
  }
  return "unknown dtype";
}

int64_t blocks_of(int64_t elements) { return (elements + kThreads - 1) / kThreads; }

template <typename T, int K, bool kBackward>
const char* launch_tiles(const Arguments& arguments, void* stream) {
  const Tiling& tiling = arguments.tiling;
  const auto kernel = arguments.problem.channels_last ? tile_kernel<T, K, kBackward, true>
                                                      : tile_kernel<T, K, kBackward, false>;
  return launch(kernel, arguments.problem.batch * tiling.channel_groups * tiles(tiling), kThreads,
                arguments.layout.end, stream, arguments);
}

template <bool kBackward>
const char* launch_tiles(const Arguments& arguments, void* stream) {
  return with_element(arguments.problem.dtype, [&](auto element) {
    using T = decltype(element);
    switch (arguments.problem.kernel_height) {
      case 3:
        return launch_tiles<T, 3, kBackward>(arguments, stream);
      case 5:
        return launch_tiles<T, 5, kBackward>(arguments, stream);
      default:
        return launch_tiles<T, 7, kBackward>(arguments, stream);
    }
  });
}

const char* launch_correlation(const Arguments& arguments, void* stream) {
  const Problem& problem = arguments.problem;
  if (tiled(problem)) return launch_tiles<false>(arguments, stream);
  const View& result = arguments.result;
  return with_element(problem.dtype, [&](auto element) {
    return launch(plain_kernel<decltype(element)>,
                  blocks_of(problem.batch * problem.channels * result.height * result.width),
                  kThreads, 0, stream, arguments);
  });
}

const char* launch_plain_weight(const Arguments& arguments, void* stream) {
  const Problem& problem = arguments.problem;
  const int64_t taps = static_cast<int64_t>(problem.kernel_height) * problem.kernel_width;
  int64_t entries = 0;
  if (arguments.grad_weight) entries += (problem.shared_weight ? 1 : problem.batch) * taps;
  if (arguments.grad_bias) entries += problem.shared_bias ? 1 : problem.batch;
  return with_element(problem.dtype, [&](auto element) {
    return launch(plain_weight_kernel<decltype(element)>, entries * problem.channels, kThreads, 0,
                  stream, arguments);
  });
}

}  // namespace

int64_t workspace_floats(const Problem& problem) {
  if (!tiled(problem)) return 0;
  const int64_t parts = tiles(choose_tiling(problem, backward_bounds(problem)));
  const bool shared = (problem.shared_weight || problem.shared_bias) && problem.batch > 1;
  if (parts == 1 && !shared) return 0;
  return parts * problem.batch * problem.channels *
         (problem.kernel_height * problem.kernel_width + 1);
}

const char* forward(const Problem& problem, const void* input, const void* weight, const void* bias,
                    void* output, void* stream) {
  return launch_correlation(make_arguments(problem, false, input, weight, bias, output), stream);
}

const char* backward(const Problem& problem, const Backward& pointers, void* stream) {
  Arguments arguments = make_arguments(problem, true, pointers.grad_output, pointers.weight,
                                       nullptr, pointers.grad_input);
  if (!pointers.grad_weight && !pointers.grad_bias) {
    return pointers.grad_input ? launch_correlation(arguments, stream) : nullptr;
  }
  arguments.centre = make_view(problem, pointers.input, problem.input, false, arguments.bounds.left,
                               16 / element_size(problem));
  arguments.grad_weight = pointers.grad_weight;
  arguments.grad_bias = pointers.grad_bias;
  if (!tiled(problem)) {
    if (pointers.grad_input) {
      if (const char* error = launch_correlation(arguments, stream)) return error;
    }
    return launch_plain_weight(arguments, stream);
  }
  const int64_t floats = workspace_floats(problem);
  arguments.workspace = floats > 0 ? pointers.workspace : nullptr;
  const char* error = launch_tiles<true>(arguments, stream);
  if (error || floats == 0) return error;
  const int64_t entries =
      problem.batch * problem.channels * (problem.kernel_height * problem.kernel_width + 1);
  return with_element(problem.dtype, [&](auto element) {
    return launch(sum_kernel<decltype(element)>, blocks_of(entries), kThreads, 0, stream,
                  arguments);
  });
}

}  // namespace vfmk::dynamic_depthwise_conv2d::cuda
