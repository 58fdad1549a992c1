// What the PyTorch boundary (mask_iou.cpp) and the kernel (cpu/) agree on. Plain data, no torch.
//
// mask[k] = resize(resize(logits[k] to [image_size, image_size]) cut to [input_height, input_width]
// to [height, width]) > threshold, resized bilinearly as PyTorch does without aligned corners;
// iou[k] = |mask[k] and target| / |mask[k] or target|, 0 where that is empty.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace vfmk::mask_iou {

struct Problem {
  DType dtype;  // of logits
  int64_t masks, low_height, low_width;
  int64_t mask_stride, row_stride;  // of logits, in elements; columns are dense
  int64_t image_size, input_height, input_width;
  int64_t height, width;  // of target, contiguous
  float threshold;
};

struct Arguments {
  const void* logits;     // [masks, low_height, low_width]
  const uint8_t* target;  // [height, width], 0 or 1
  float* iou;             // [masks]
  void* workspace;        // workspace_bytes(problem) of them, 64-byte aligned, uninitialised
};

}  // namespace vfmk::mask_iou
