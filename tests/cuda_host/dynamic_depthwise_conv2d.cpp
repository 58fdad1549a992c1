// Runs the operator's CUDA source on the CPU: reads calls from stdin until its end, and writes what
// each call wrote. tests/cuda/test_host_harness.py holds the other end.
//
// A call is kHeader int64 values, then `input, weight, bias, grad_output` as a byte count (-1:
// null) and the bytes; its answer, the outputs in the same form. Buffers are exactly as long as
// told.
#include "../../csrc/dynamic_depthwise_conv2d.h"

#include "calls.h"

namespace {

namespace operation = vfmk::dynamic_depthwise_conv2d;

constexpr int kHeader = 36;

}  // namespace

int main() {
  int64_t header[kHeader];
  while (std::fread(header, sizeof header, 1, stdin) == 1) {
    const int64_t* next = header;
    const bool backward = *next++;
    cuda_host::order = static_cast<cuda_host::Order>(*next++);
    cuda_host::multiprocessors = *next++;
    const int64_t shift = *next++;

    operation::Problem problem{};
    problem.dtype = static_cast<vfmk::DType>(*next++);
    problem.channels_last = *next++;
    problem.shared_weight = *next++;
    problem.shared_bias = *next++;
    problem.batch = *next++;
    problem.channels = *next++;
    for (int32_t* field :
         {&problem.input_height, &problem.input_width, &problem.output_height,
          &problem.output_width, &problem.kernel_height, &problem.kernel_width, &problem.pad_top,
          &problem.pad_left, &problem.dilation_height, &problem.dilation_width}) {
      *field = static_cast<int32_t>(*next++);
    }
    for (vfmk::Strides* strides : {&problem.input, &problem.output, &problem.grad_input}) {
      *strides = {next[0], next[1], next[2], next[3]};
      next += 4;
    }
    // Bytes of output, grad_input, grad_weight, grad_bias; -1 where nobody asks.
    Buffer output(*next++, shift), grad_input(*next++, shift), grad_weight(*next++, shift),
        grad_bias(*next++, shift);
    if (next != header + kHeader) cuda_host::fail("the header has another length");

    Buffer input(read_count(), shift);
    read(input);
    Buffer weight(read_count(), shift);
    read(weight);
    Buffer bias(read_count(), shift);
    read(bias);
    Buffer grad_output(read_count(), shift);
    read(grad_output);

    const char* error = nullptr;
    if (backward) {
      Buffer workspace(operation::cuda::workspace_floats(problem) * sizeof(float), 0);
      const operation::Backward pointers{grad_output.data(),
                                         input.data(),
                                         weight.data(),
                                         grad_input.data(),
                                         grad_weight.data(),
                                         grad_bias.data(),
                                         reinterpret_cast<float*>(workspace.data())};
      error = operation::cuda::backward(problem, pointers, nullptr);
    } else {
      error = operation::cuda::forward(problem, input.data(), weight.data(), bias.data(),
                                       output.data(), nullptr);
    }
    if (error) cuda_host::fail(error);
    for (const Buffer* buffer : {&output, &grad_input, &grad_weight, &grad_bias}) write(*buffer);
    std::fflush(stdout);
  }
}
