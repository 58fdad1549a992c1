// How a driver of tests/cuda_host takes calls from stdin and gives their results to stdout: buffers
// as a byte count (-1: null) and the bytes, exactly as long as told.
#pragma once

#include <cuda_runtime.h>

namespace {

struct Buffer {  // `shift` bytes past an address that any access may use
  char* memory = nullptr;
  int64_t bytes = -1, shift = 0;

  Buffer(int64_t bytes, int64_t shift) : bytes(bytes), shift(shift) {
    if (bytes < 0) return;
    void* address = nullptr;
    if (posix_memalign(&address, 256, bytes + shift) != 0) std::abort();
    memory = static_cast<char*>(address);
    std::memset(memory, 0xFF, bytes + shift);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(memory); }
  char* data() const { return memory ? memory + shift : nullptr; }
};

int64_t read_count() {
  int64_t value = 0;
  if (std::fread(&value, sizeof value, 1, stdin) != 1) cuda_host::fail("a call is cut short");
  return value;
}

void read(const Buffer& buffer) {
  if (buffer.bytes > 0 && std::fread(buffer.data(), buffer.bytes, 1, stdin) != 1) {
    cuda_host::fail("a call is cut short");
  }
}

void write(const Buffer& buffer) {
  std::fwrite(&buffer.bytes, sizeof buffer.bytes, 1, stdout);
  if (buffer.bytes > 0) std::fwrite(buffer.data(), buffer.bytes, 1, stdout);
}

}  // namespace
