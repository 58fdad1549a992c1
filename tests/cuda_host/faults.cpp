// Kernels with one fault each, named by the first argument: what the shim must not let pass.
// Run without one, the program ends well.
#include <cuda_runtime.h>

namespace {

enum class Fault {
  none,
  no_barrier,
  uninitialised,
  past_the_end,
  divergent_barrier,
  divergent_warp,
  early_exit,
  copy_not_awaited,
};

void kernel(Fault fault, const float* input, float* output) {
  VFMK_DYNAMIC_SHARED(float, shared);
  __shared__ float still[1];
  const int thread = threadIdx.x, other = (thread + 33) % blockDim.x;
  if (fault == Fault::early_exit && thread == 5) return;
  if (fault == Fault::copy_not_awaited) {
    cuda_host::copy_async(reinterpret_cast<uintptr_t>(shared + thread), input + thread, 4, true);
  } else if (fault != Fault::uninitialised || thread != 7) {
    shared[thread + (fault == Fault::past_the_end)] = input[thread];
  }
  if (thread == 0) still[0] = 0.0f;
  if (fault == Fault::divergent_barrier && thread < 32) {
    __syncwarp();
  } else if (fault != Fault::no_barrier) {
    __syncthreads();
  }
  float value = shared[other] + still[0];
  if (fault == Fault::divergent_warp && thread % 2) {
    value += __shfl_xor_sync(~0u, 0.0f, 1);
  } else {
    value += __shfl_sync(~0u, 0.0f, 0);
  }
  output[blockIdx.x * blockDim.x + thread] = value;
}

}  // namespace

int main(int count, char** arguments) {
  const Fault fault = count > 1 ? static_cast<Fault>(std::atoi(arguments[1])) : Fault::none;
  constexpr int kThreads = 64, kBlocks = 2;
  float input[kThreads];
  for (int n = 0; n < kThreads; ++n) input[n] = static_cast<float>(n);
  for (auto order : {cuda_host::Order::forward, cuda_host::Order::reverse}) {
    cuda_host::order = order;
    std::vector<float> output(kBlocks * kThreads);
    VFMK_LAUNCH(kernel, kBlocks, kThreads, kThreads * sizeof(float), nullptr)
    (fault, input, output.data());
    for (int n = 0; n < kBlocks * kThreads; ++n) {
      if (output[n] != (n + 33) % kThreads) cuda_host::fail("a wrong result");
    }
  }
}
