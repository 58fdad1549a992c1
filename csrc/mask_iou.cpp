// The PyTorch boundary of mask_iou: tensors become the plain data of the header.
// vfmk/ops/mask_iou.py has checked every argument and allocated the output. There is a CPU kernel
// alone: Triton serves GPUs.
#include "mask_iou.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "boundary.h"

namespace vfmk::mask_iou {

namespace cpu {

// The kernel of cpu/mask_iou.cpp, compiled once for each instruction set.
#define VFMK_DECLARE(isa)                                           \
  namespace isa {                                                   \
  int64_t workspace_bytes(const Problem& problem);                  \
  void forward(const Problem& problem, const Arguments& arguments); \
  }
VFMK_DECLARE(baseline)
VFMK_DECLARE(avx2)
VFMK_DECLARE(avx512)

int64_t workspace_bytes(const Problem& problem) { VFMK_DISPATCH(workspace_bytes(problem)); }

void forward(const Problem& problem, const Arguments& arguments) {
  VFMK_DISPATCH(forward(problem, arguments));
}

}  // namespace cpu

namespace {

constexpr const char* NAME = "mask_iou";

void forward_cpu(Tensor logits, Tensor target, std::vector<int64_t> input_size, int64_t image_size,
                 double threshold, Tensor iou) {
  check_arguments(NAME, logits.scalar_type(), {{"logits", logits, Layout::dense_last}});
  check_arguments(NAME, ScalarType::Bool, {{"target", target, Layout::contiguous}});
  check_arguments(NAME, ScalarType::Float, {{"iou", iou, Layout::contiguous}});
  Problem problem{};
  problem.dtype = dtype_of(logits, NAME);
  problem.masks = logits.size(0);
  problem.low_height = logits.size(1);
  problem.low_width = logits.size(2);
  problem.mask_stride = logits.stride(0);
  problem.row_stride = logits.stride(1);
  problem.image_size = image_size;
  problem.input_height = input_size[0];
  problem.input_width = input_size[1];
  problem.height = target.size(0);
  problem.width = target.size(1);
  problem.threshold = static_cast<float>(threshold);
  const Tensor workspace = torch::stable::empty({cpu::workspace_bytes(problem)}, ScalarType::Byte);
  cpu::forward(problem,
               {logits.const_data_ptr(), static_cast<const uint8_t*>(target.const_data_ptr()),
                static_cast<float*>(iou.mutable_data_ptr()), workspace.mutable_data_ptr()});
}

}  // namespace
}  // namespace vfmk::mask_iou

STABLE_TORCH_LIBRARY_FRAGMENT(vfmk_native, m) {
  m.def(
      "mask_iou_forward(Tensor logits, Tensor target, int[] input_size, int image_size, "
      "float threshold, Tensor(a!) iou) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vfmk_native, CPU, m) {
  m.impl("mask_iou_forward", TORCH_BOX(&vfmk::mask_iou::forward_cpu));
}
