// A loop over torch's own threads, so that torch.set_num_threads holds for these kernels too.
// Internal linkage: units compiled for different instruction sets must not share one copy.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <stdexcept>

namespace vfmk {
namespace {

// body(begin, end) on disjoint ranges that cover [0, count), none shorter than `grain` unless
// count is. What a body throws reaches the caller as a std::runtime_error.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  if (torch_parallel_for(0, count, grain, call, const_cast<Body*>(&body)) != 0) {
    throw std::runtime_error("vfmk: a parallel loop failed (out of memory?)");
  }
}

}  // namespace
}  // namespace vfmk
