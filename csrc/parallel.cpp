#include "parallel.h"

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace vfmk {
namespace {

struct Scratch {
  float* data = nullptr;
  int64_t floats = 0;
  ~Scratch() { std::free(data); }
};

thread_local Scratch scratch;

}  // namespace

void run_on_threads(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*),
                    void* context) {
  STD_TORCH_CHECK(torch_parallel_for(0, count, grain, body, context) == 0,
                  "vfmk: a parallel loop failed, most likely for want of memory");
}

float* thread_scratch(int64_t floats) {
  if (floats > scratch.floats) {
    std::free(scratch.data);
    const int64_t rounded = (floats + 15) / 16 * 16;
    scratch.floats = 0;
    scratch.data = static_cast<float*>(std::aligned_alloc(64, rounded * sizeof(float)));
    if (scratch.data == nullptr) throw std::bad_alloc();
    std::memset(scratch.data, 0, rounded * sizeof(float));
    scratch.floats = rounded;
  }
  return scratch.data;
}

}  // namespace vfmk
