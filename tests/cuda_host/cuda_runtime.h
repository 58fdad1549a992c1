// Stands in for CUDA's header, so that g++ compiles a .cu file and runs its kernels on the CPU
// under AddressSanitizer and UndefinedBehaviorSanitizer. Not an emulator of speed: of meaning.
//
// A block's threads are fibers. One runs until it meets a barrier or a warp-wide operation, then
// gives way. Threads that wait for each other at different places, for threads that have left, or
// for ever, end the program with a message. Blocks and threads run in an order that the driver
// chooses; a result that depends on it is a race. Shared memory has exactly the size asked for and
// is filled with NaN before each block; asynchronous copies land only when they are waited for.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define VFMK_HOST_HARNESS
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static __attribute__((section("vfmk_shared")))
#define VFMK_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(cuda_host::dynamic_shared)
#define VFMK_LAUNCH(kernel, blocks, threads, shared_bytes, stream) \
  cuda_host::Grid{blocks, threads, shared_bytes}.bind(kernel)

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;

inline uint3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int bytes);

// The bounds of the __shared__ variables, which the linker knows; null where there are none.
extern "C" char __start_vfmk_shared[] __attribute__((weak));
extern "C" char __stop_vfmk_shared[] __attribute__((weak));

namespace cuda_host {

enum class Order { forward, reverse, shuffled };
inline Order order = Order::forward;  // of blocks, and of threads between two barriers
inline int multiprocessors = 132;     // that a kernel's tiles are chosen for
inline char* dynamic_shared = nullptr;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_host: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

inline std::vector<int> ordered(int count, int seed) {
  std::vector<int> indices(count);
  std::iota(indices.begin(), indices.end(), 0);
  if (order == Order::reverse) std::reverse(indices.begin(), indices.end());
  if (order == Order::shuffled) std::shuffle(indices.begin(), indices.end(), std::mt19937(seed));
  return indices;
}

// Threads that must all arrive before any goes on. `kind` and `line` say where they are.
struct Meeting {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
  const char* kind = nullptr;
  int line = 0;
};

struct Warp {
  Meeting meeting;
  alignas(16) char slots[2][32][64];  // what each lane brings, for this meeting and the next
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool exists;
};

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  const Meeting* waits_for = nullptr;
  uint64_t generation = 0;
  bool done = false;
  std::vector<Copy> copies;
  bool runnable() const { return !done && !(waits_for && waits_for->generation == generation); }
};

constexpr size_t kSharedBytes = 48 * 1024;      // of a block, unless it asks for more
constexpr size_t kMostSharedBytes = 99 * 1024;  // on the architecture that has least
inline std::map<const void*, size_t> asked;     // for each kernel

constexpr size_t kStackBytes = 64 * 1024;
inline std::vector<std::unique_ptr<char[]>> stacks;  // of fibers, for one launch after the other

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Meeting barrier;
  std::vector<int> sequence, place;  // the order of threads, and each thread's place in it
  std::function<void()> body;
  int current = -1;
  ucontext_t outside;
  void* outside_fake_stack = nullptr;
  const void* outside_stack = nullptr;
  size_t outside_bytes = 0;
};
inline Block* block = nullptr;

inline void arrive_from_switch(void* fake_stack) {
  const void* from = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &from, &bytes);
  if (!block->outside_stack) block->outside_stack = from, block->outside_bytes = bytes;
}

inline void switch_to(int thread, ucontext_t* from, void** fake_stack) {
  Fiber& fiber = block->fibers[thread];
  block->current = thread;
  __sanitizer_start_switch_fiber(fake_stack, fiber.stack, kStackBytes);
  swapcontext(from, &fiber.context);
}

inline int next_runnable(int after) {
  const int count = block->fibers.size();
  for (int n = 1; n <= count; ++n) {
    const int thread = block->sequence[(after + n) % count];
    if (block->fibers[thread].runnable()) return thread;
  }
  return -1;
}

inline void give_way() {
  const int self = block->current;
  const int next = next_runnable(block->place[self]);
  if (next < 0) fail("deadlock: every thread waits");
  if (next != self) {
    Fiber& fiber = block->fibers[self];
    switch_to(next, &fiber.context, &fiber.fake_stack);
    arrive_from_switch(fiber.fake_stack);
  }
  block->current = self;
  threadIdx.x = self;
}

inline void meet(Meeting& meeting, const char* kind, int line = 0) {
  if (meeting.arrived == 0) meeting.kind = kind, meeting.line = line;
  if (std::strcmp(meeting.kind, kind) != 0 || meeting.line != line) {
    fail("threads of one warp or block wait at two places");
  }
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  Fiber& fiber = block->fibers[block->current];
  fiber.waits_for = &meeting;
  fiber.generation = meeting.generation;
  give_way();
  fiber.waits_for = nullptr;
}

inline void fiber_main() {  // once for each block
  arrive_from_switch(nullptr);
  while (true) {
    Fiber& self = block->fibers[block->current];
    threadIdx.x = block->current;
    block->body();
    if (!self.copies.empty()) fail("a thread left before its asynchronous copies landed");
    self.done = true;
    const int next = next_runnable(block->place[block->current]);
    if (next >= 0) {
      switch_to(next, &self.context, &self.fake_stack);
    } else {
      for (const Fiber& fiber : block->fibers) {
        if (!fiber.done) fail("deadlock: threads wait for others that have left");
      }
      __sanitizer_start_switch_fiber(&self.fake_stack, block->outside_stack, block->outside_bytes);
      swapcontext(&self.context, &block->outside);
    }
    arrive_from_switch(self.fake_stack);
  }
}

__attribute__((no_sanitize("address"))) inline void poison_static_shared() {
  for (volatile char* byte = __start_vfmk_shared; byte < __stop_vfmk_shared; ++byte) *byte = ~0;
}

inline void run_block(Block& state, int threads, size_t shared_bytes) {
  block = &state;
  std::unique_ptr<char, decltype(&std::free)> shared(nullptr, &std::free);
  if (shared_bytes > 0) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, shared_bytes) != 0) fail("out of memory");
    shared.reset(static_cast<char*>(memory));
    std::memset(memory, 0xFF, shared_bytes);
  }
  dynamic_shared = shared.get();
  poison_static_shared();
  state.sequence = ordered(threads, blockIdx.x);
  state.place.resize(threads);
  for (int n = 0; n < threads; ++n) state.place[state.sequence[n]] = n;
  state.barrier = Meeting{threads};
  for (size_t w = 0; w < state.warps.size(); ++w) {
    state.warps[w].meeting = Meeting{std::min(32, threads - 32 * static_cast<int>(w))};
  }
  for (Fiber& fiber : state.fibers) fiber.done = false;
  switch_to(state.sequence[0], &state.outside, &state.outside_fake_stack);
  arrive_from_switch(state.outside_fake_stack);
  dynamic_shared = nullptr;
}

struct Grid {
  unsigned blocks;
  int threads;
  size_t shared_bytes;

  template <typename... Parameters>
  auto bind(void (*kernel)(Parameters...)) const {
    return [*this, kernel](Parameters... parameters) {
      const auto most = asked.find(reinterpret_cast<const void*>(kernel));
      if (shared_bytes > (most == asked.end() ? kSharedBytes : most->second)) {
        fail("more shared memory than the kernel may have");
      }
      gridDim = {blocks, 1, 1};
      blockDim = {static_cast<unsigned>(threads), 1, 1};
      Block state;
      state.fibers.resize(threads);
      state.warps.resize((threads + 31) / 32);
      while (static_cast<int>(stacks.size()) < threads) stacks.emplace_back(new char[kStackBytes]);
      for (int n = 0; n < threads; ++n) {
        Fiber& fiber = state.fibers[n];
        fiber.stack = stacks[n].get();
        __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // an earlier launch's frames
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, fiber_main, 0);
      }
      state.body = [&] { kernel(parameters...); };
      for (int index : ordered(blocks, 0)) {
        blockIdx = {static_cast<unsigned>(index), 0, 0};
        run_block(state, threads, shared_bytes);
      }
    };
  }
};

inline int lane() { return threadIdx.x % 32; }

// What each lane brought to a meeting; stays until this lane goes to the next.
template <typename T>
struct Received {
  const char (*slots)[64];
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, slots[lane], sizeof(T));
    return value;
  }
};

// Brings `value` to a meeting of the whole warp.
template <typename T>
Received<T> exchange(const char* kind, const T& value, int line = 0) {
  static_assert(sizeof(T) <= 64);
  Warp& warp = block->warps[threadIdx.x / 32];
  auto& slots = warp.slots[warp.meeting.generation % 2];
  std::memcpy(slots[lane()], &value, sizeof(T));
  meet(warp.meeting, kind, line);
  return {slots};
}

inline void copy_async(uintptr_t shared, const void* global, int bytes, bool exists) {
  if (shared % bytes || reinterpret_cast<uintptr_t>(global) % bytes) {
    fail("an asynchronous copy is not aligned");
  }
  block->fibers[block->current].copies.push_back(
      {reinterpret_cast<void*>(shared), global, bytes, exists});
}

inline void wait_for_copies() {
  auto& copies = block->fibers[block->current].copies;
  for (const Copy& copy : copies) {
    if (copy.exists) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }
  copies.clear();
}

inline void load_matrices(uint32_t* matrix, int count, uintptr_t row, bool transposed) {
  if (row % 16) fail("a matrix row is not aligned");
  const auto rows = exchange(transposed ? "ldmatrix.trans" : "ldmatrix", row);
  const int group = lane() / 4, pair = lane() % 4 * 2;
  const auto element = [&](int m, int r, int c) {
    return static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(rows[8 * m + r])[c]);
  };
  for (int m = 0; m < count; ++m) {
    matrix[m] = transposed ? element(m, pair, group) | element(m, pair + 1, group) << 16
                           : element(m, group, pair) | element(m, group, pair + 1) << 16;
  }
}

template <typename T>
float element_to_float(uint16_t bits);

template <typename T>
void multiply_add(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  struct Fragments {
    float left[4][2], right[2][2];
  } own;
  for (int half = 0; half < 2; ++half) {
    for (int r = 0; r < 4; ++r) own.left[r][half] = element_to_float<T>(left[r] >> 16 * half);
    for (int r = 0; r < 2; ++r) own.right[r][half] = element_to_float<T>(right[r] >> 16 * half);
  }
  const auto fragments = exchange("mma", own);
  // Row m, column k of the left matrix lies in lane 4 * (m % 8) + k % 8 / 2, register
  // m / 8 + 2 * (k / 8), half k % 2; row k, column n of the right in lane 4 * n + k % 8 / 2.
  const int group = lane() / 4, pair = lane() % 4 * 2;
  for (int t = 0; t < 4; ++t) {
    const Fragments rows = fragments[4 * group + t];
    for (int c = 0; c < 2; ++c) {
      const Fragments column = fragments[4 * (pair + c) + t];
      for (int r = 0; r < 2; ++r) {
        for (int k = 0; k < 4; ++k) {
          sums[2 * r + c] += rows.left[r + k / 2 * 2][k % 2] * column.right[k / 2][k % 2];
        }
      }
    }
  }
}

}  // namespace cuda_host

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > static_cast<int>(cuda_host::kMostSharedBytes)) {
    cuda_host::fail("more shared memory than the smallest architecture has");
  }
  cuda_host::asked[kernel] = bytes;
  return cudaSuccess;
}

inline void __syncthreads(int line = __builtin_LINE()) {
  cuda_host::meet(cuda_host::block->barrier, "__syncthreads", line);
}

inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  if (mask != ~0u) cuda_host::fail("part of a warp meets, which is not covered");
  cuda_host::meet(cuda_host::block->warps[threadIdx.x / 32].meeting, "__syncwarp", line);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  if (mask != ~0u || width != 32) cuda_host::fail("part of a warp meets, which is not covered");
  return cuda_host::exchange("shuffle", value, line)[source & 31];
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, int line = __builtin_LINE()) {
  return __shfl_sync(mask, value, cuda_host::lane() ^ lanes, width, line);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int lanes, int width = 32, int line = __builtin_LINE()) {
  const int source = cuda_host::lane() + lanes;
  return __shfl_sync(mask, value, source < 32 ? source : cuda_host::lane(), width, line);
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int n = 0; n < 4; ++n) {
    result |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * n) & 7)) & 0xFF) << (8 * n);
  }
  return result;
}
