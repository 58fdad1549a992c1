// A tile of an NCHW or channels-last tensor as planes in shared memory, one for each channel, and
// back: past these two functions a kernel knows no layout.
//
// NCHW is copied asynchronously, in vectors where alignment allows it, else in words. Channels-last
// comes as 16-byte channel vectors of one pixel (two pixels at a time where elements have 16 bits)
// and is turned on the way. Anything else moves element by element.
#pragma once

#include "../strides.h"
#include "launch.h"

namespace vfmk::cuda {

enum class Access { elements, words, vectors };

struct View {
  void* data;
  Strides strides;
  int height, width;
  Access access;
};

// Sizes are in elements. The even rows of a plane come first, then the odd ones, an odd number of
// 16-byte units apart: eight rows that lie next but one to each other meet different banks, which
// is what the matrix instructions ask for. `padding` follows each kVector<T> planes.
template <typename T>
struct Planes {
  T* data;
  int rows, columns, pitch, plane, padding;  // an even number of rows

  __device__ T* channel(int index) const {
    return data + index * plane + index / kVector<T> * padding;
  }
};

// The part of a view under a tile: `channels` of 1 << `channel_bits` exist. Row and column lie
// outside the view where the tile does.
struct Place {
  int sample, channel, channels, channel_bits, row, column;
};

// How a block's threads share a tile: `neighbour` counts what lies side by side in a pixel of a
// channels-last tensor, `lane` what does in a row. A thread takes every kLanes-th item of every
// `rows`-th row from `row` on. A warp's rows are all even or all odd, and few lanes share one, so
// that channels-last words meet different banks.
template <int kThreads, bool kChannelsLast>
struct Part {
  static constexpr int kLanes = kChannelsLast ? 4 : 8;
  int neighbour, lane, row, rows;

  __device__ explicit Part(int neighbour_bits) {
    const int thread = hidden(threadIdx.x), index = thread / kLanes >> neighbour_bits;
    neighbour = thread & ((1 << neighbour_bits) - 1);
    lane = thread >> neighbour_bits & (kLanes - 1);
    rows = kThreads / kLanes >> neighbour_bits;
    row = 2 * (index & (rows / 2 - 1)) + (index >= rows / 2);
  }
};

// Calls visit(row, address in the tensor, offset in shared memory) for a thread's rows of all
// channels. `global` is where the tile begins.
template <typename Part, typename T, typename U, typename Visit>
__device__ void each_row(const Part& part, const Planes<T>& tile, int channels, U* global,
                         const Strides& strides, Visit visit) {
  int channel = 0, row = part.row;
  int offset = (row / 2 + row % 2 * (tile.rows / 2)) * tile.pitch;
  global += row * strides.row;
  while (true) {
    for (; row >= tile.rows; row -= tile.rows, ++channel) {
      offset += tile.plane - tile.rows / 2 * tile.pitch;
      global += strides.channel - tile.rows * strides.row;
    }
    if (channel >= channels) return;
    visit(row, global, offset);
    row += part.rows;
    offset += part.rows / 2 * tile.pitch;
    global += part.rows * strides.row;
  }
}

// `size` counts from `first`: one comparison for both ends.
__device__ inline bool within(int value, int first, int size) {
  return static_cast<unsigned>(value - first) < static_cast<unsigned>(size);
}

// Calls visit(n, item) for a thread's items of a row, kBatch by kBatch, n counting within a batch.
inline constexpr int kBatch = 5;
template <typename Part, typename First, typename Second>
__device__ void each_batch(const Part& part, int items, First first, Second second) {
#pragma unroll 1
  for (int start = part.lane; start < items; start += kBatch * Part::kLanes) {
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (start + n * Part::kLanes < items) first(n, start + n * Part::kLanes);
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (start + n * Part::kLanes < items) second(n, start + n * Part::kLanes);
    }
  }
}

// One word of each plane under a 16-byte channel vector.
template <typename T>
struct Pixels {
  static constexpr int kCount = 4 / sizeof(T);
  uint4 pixel[kCount];

  __device__ void to_planes(T* plane, int stride) const {
    const auto put = [&](int channel, uint32_t word) {
      *reinterpret_cast<uint32_t*>(plane + channel * stride) = word;
    };
    const uint4 &a = pixel[0], &b = pixel[kCount - 1];
    if constexpr (kCount == 2) {
      put(0, __byte_perm(a.x, b.x, 0x5410)), put(1, __byte_perm(a.x, b.x, 0x7632));
      put(2, __byte_perm(a.y, b.y, 0x5410)), put(3, __byte_perm(a.y, b.y, 0x7632));
      put(4, __byte_perm(a.z, b.z, 0x5410)), put(5, __byte_perm(a.z, b.z, 0x7632));
      put(6, __byte_perm(a.w, b.w, 0x5410)), put(7, __byte_perm(a.w, b.w, 0x7632));
    } else {
      put(0, a.x), put(1, a.y), put(2, a.z), put(3, a.w);
    }
  }

  __device__ void from_planes(const T* plane, int stride) {
    const auto get = [&](int channel) {
      return *reinterpret_cast<const uint32_t*>(plane + channel * stride);
    };
    if constexpr (kCount == 2) {
      const auto pair = [&](int channel, uint32_t& first, uint32_t& second) {
        const uint32_t even = get(channel), odd = get(channel + 1);
        first = __byte_perm(even, odd, 0x5410), second = __byte_perm(even, odd, 0x7632);
      };
      uint4 &a = pixel[0], &b = pixel[1];
      pair(0, a.x, b.x), pair(2, a.y, b.y), pair(4, a.z, b.z), pair(6, a.w, b.w);
    } else {
      pixel[0] = make_uint4(get(0), get(1), get(2), get(3));
    }
  }
};

template <int kCopy, int kThreads, typename T>
__device__ void copy_rows(const Planes<T>& tile, const View& view, const Place& place,
                          const T* source) {
  const Part<kThreads, false> part(0);
  constexpr int kStride = part.kLanes * kCopy;
  const int lane = part.lane * kCopy, end = place.column + tile.columns;
  const SharedAddress shared = shared_address(tile.data + lane);
  each_row(part, tile, place.channels, source + lane, view.strides,
           [&](int row, const T* from, int offset) {
             const bool exists = within(place.row + row, 0, view.height);
             SharedAddress to = shared + offset * sizeof(T);
#pragma unroll 1
             for (int column = place.column + lane; column < end; column += kBatch * kStride) {
#pragma unroll
               for (int n = 0; n < kBatch; ++n) {
                 if (column + n * kStride >= end) break;
                 copy_async<kCopy * sizeof(T)>(
                     to + n * kStride * sizeof(T), from + n * kStride,
                     exists && within(column + n * kStride, 0, view.width));
               }
               from += kBatch * kStride, to += kBatch * kStride * sizeof(T);
             }
           });
}

// Fills the channels of `tile` that exist; positions outside the view become zeros, and so may
// `unused` columns at either end. A vector of NCHW has kCopy elements. Done after
// wait_for_copies() and a barrier.
template <bool kChannelsLast, int kCopy, int kThreads, typename T>
__device__ void load_planes(const Planes<T>& tile, const View& view, const Place& place,
                            int unused) {
  const Strides& strides = view.strides;
  const T* source = static_cast<const T*>(view.data) + place.sample * strides.batch +
                    place.channel * strides.channel + place.row * strides.row +
                    place.column * strides.column;
  const int left = max(0, place.column + unused);
  const int width = max(0, min(view.width, place.column + tile.columns - unused) - left);

  if constexpr (!kChannelsLast) {
    if (view.access == Access::vectors) {
      return copy_rows<kCopy, kThreads>(tile, view, place, source);
    }
    if (view.access == Access::words) {
      return copy_rows<4 / sizeof(T), kThreads>(tile, view, place, source);
    }
  } else if (view.access == Access::vectors) {
    constexpr int kPixels = Pixels<T>::kCount;
    const Part<kThreads, true> part(place.channel_bits - kVectorBits<T>);
    const int channel = part.neighbour * kVector<T>;
    if (channel >= place.channels) return;
    T* planes = tile.channel(channel);
    const int64_t step = part.kLanes * kPixels * strides.column;
    each_row(part, tile, 1, source + channel + part.lane * kPixels * strides.column, strides,
             [&](int row, const T* from, int offset) {
               const bool exists = within(place.row + row, 0, view.height);
               Pixels<T> pixels[kBatch];
               each_batch(
                   part, tile.columns / kPixels,
                   [&](int n, int item) {
#pragma unroll
                     for (int p = 0; p < kPixels; ++p) {
                       pixels[n].pixel[p] = make_uint4(0, 0, 0, 0);
                       if (exists && within(place.column + item * kPixels + p, left, width)) {
                         pixels[n].pixel[p] =
                             *reinterpret_cast<const uint4*>(from + p * strides.column);
                       }
                     }
                     from += step;
                   },
                   [&](int n, int item) {
                     pixels[n].to_planes(planes + offset + item * kPixels, tile.plane);
                   });
             });
    return;
  }

  const Part<kThreads, kChannelsLast> part(kChannelsLast ? place.channel_bits : 0);
  if (part.neighbour >= place.channels) return;
  T* planes = tile.channel(part.neighbour);
  each_row(part, tile, kChannelsLast ? 1 : place.channels,
           source + part.neighbour * strides.channel, strides,
           [&](int row, const T* from, int offset) {
             const bool exists = within(place.row + row, 0, view.height);
             T values[kBatch];
             each_batch(
                 part, tile.columns,
                 [&](int n, int column) {
                   values[n] = from_float<T>(0.0f);
                   if (exists && within(place.column + column, left, width)) {
                     values[n] = from[column * strides.column];
                   }
                 },
                 [&](int n, int column) { planes[offset + column] = values[n]; });
           });
}

// Writes what of `tile` lies in the view.
template <bool kChannelsLast, int kThreads, typename T>
__device__ void store_planes(const Planes<T>& tile, const View& view, const Place& place) {
  const Strides& strides = view.strides;
  T* target = static_cast<T*>(view.data) + place.sample * strides.batch +
              place.channel * strides.channel + place.row * strides.row +
              place.column * strides.column;
  const bool vectors = view.access == Access::vectors;
  const Part<kThreads, kChannelsLast> part(
      kChannelsLast ? place.channel_bits - (vectors ? kVectorBits<T> : 0) : 0);
  const int channel = part.neighbour * (vectors ? kVector<T> : 1);
  if (channel >= place.channels) return;
  const T* planes = tile.channel(channel);
  each_row(part, tile, kChannelsLast ? 1 : place.channels, target + channel * strides.channel,
           strides, [&](int row, T* to, int offset) {
             if (!within(place.row + row, 0, view.height)) return;
             const T* from = planes + offset;
             const auto exists = [&](int column) {
               return within(place.column + column, 0, view.width);
             };
             const auto nothing = [](int, int) {};
             if (!vectors) {
               each_batch(
                   part, tile.columns,
                   [&](int, int column) {
                     if (exists(column)) to[column * strides.column] = from[column];
                   },
                   nothing);
             } else if constexpr (kChannelsLast) {
               constexpr int kPixels = Pixels<T>::kCount;
               each_batch(
                   part, tile.columns / kPixels,
                   [&](int, int item) {
                     Pixels<T> pixels;
                     pixels.from_planes(from + item * kPixels, tile.plane);
#pragma unroll
                     for (int p = 0; p < kPixels; ++p) {
                       const int column = item * kPixels + p;
                       if (!exists(column)) continue;
                       *reinterpret_cast<uint4*>(to + column * strides.column) = pixels.pixel[p];
                     }
                   },
                   nothing);
             } else {
               each_batch(
                   part, tile.columns / kVector<T>,
                   [&](int, int item) {
                     const int column = item * kVector<T>;
                     if (!exists(column)) return;
                     *reinterpret_cast<uint4*>(to + column) =
                         *reinterpret_cast<const uint4*>(from + column);
                   },
                   nothing);
             }
           });
}

}  // namespace vfmk::cuda
