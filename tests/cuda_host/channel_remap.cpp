// Runs the operator's CUDA source on the CPU: reads calls from stdin until its end, and writes what
// each call wrote. tests/cuda/test_host_harness_channel_remap.py holds the other end.
//
// A call is kHeader int64 values, then `input, index, scale, grad_output` as a byte count (-1:
// null) and the bytes; its answer, the outputs in the same form. Buffers are exactly as long as
// told.
#include "../../csrc/channel_remap.h"

#include "calls.h"

namespace {

namespace operation = vfmk::channel_remap;

constexpr int kHeader = 25;

}  // namespace

int main() {
  int64_t header[kHeader];
  while (std::fread(header, sizeof header, 1, stdin) == 1) {
    const int64_t* next = header;
    const bool backward = *next++;
    cuda_host::order = static_cast<cuda_host::Order>(*next++);
    const int64_t shift = *next++;

    operation::Problem problem{};
    problem.dtype = static_cast<vfmk::DType>(*next++);
    problem.channels_last = *next++;
    for (int64_t* field : {&problem.maps, &problem.samples, &problem.input_channels,
                           &problem.output_channels, &problem.rows, &problem.columns}) {
      *field = *next++;
    }
    for (vfmk::Strides* strides : {&problem.input, &problem.output, &problem.grad_input}) {
      *strides = {next[0], next[1], next[2], next[3]};
      next += 4;
    }
    // Bytes of output or grad_input, and of grad_scale; -1 where nobody asks.
    Buffer activation(*next++, shift), grad_scale(*next++, 0);
    if (next != header + kHeader) cuda_host::fail("the header has another length");

    Buffer input(read_count(), shift);
    read(input);
    Buffer index(read_count(), 0);
    read(index);
    Buffer scale(read_count(), 0);
    read(scale);
    Buffer grad_output(read_count(), shift);
    read(grad_output);

    const auto* positions = reinterpret_cast<const int64_t*>(index.data());
    const char* error = nullptr;
    if (backward) {
      Buffer workspace(operation::cuda::workspace_words(problem) * 4, 0);
      error = operation::cuda::backward(problem,
                                        {grad_output.data(), input.data(), positions, scale.data(),
                                         activation.data(), grad_scale.data(), workspace.data()},
                                        nullptr);
    } else {
      error = operation::cuda::forward(
          problem, {input.data(), positions, scale.data(), activation.data()}, nullptr);
    }
    if (error) cuda_host::fail(error);
    write(activation);
    write(grad_scale);
    std::fflush(stdout);
  }
}
