// Threads and their memory for the kernels under cpu/. Those are compiled once for each instruction
// set, so nothing here may be an inline function that the linker would share between them.
#pragma once

#include <cstdint>

namespace vfmk {

// body(begin, end, context) on disjoint ranges that cover [0, count), on torch's own threads, so
// that torch.set_num_threads holds. No range is shorter than `grain` unless it is the last.
void run_on_threads(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*),
                    void* context);

// Memory of the calling thread: 64-byte aligned, zeros at first, then whatever it was left with.
// It grows to the largest call and lives as long as the thread.
float* thread_scratch(int64_t floats);

namespace {

template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  run_on_threads(count, grain, call, const_cast<Body*>(&body));
}

}  // namespace
}  // namespace vfmk
