"""Intersection over union of SAM's postprocessed masks with a target, in plain PyTorch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmk.reference.sums import dtype_of_sums


def mask_iou(
    logits: Tensor,
    target: Tensor,
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    image_size: int,
    *,
    threshold: float = 0.0,
) -> Tensor:
    """See `vfmk.ops.mask_iou`. Half-precision logits are interpolated in fp32; one at a time."""
    iou = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    forward(logits.detach(), target, input_size, image_size, threshold, iou)
    return iou


def forward(
    logits: Tensor,
    target: Tensor,
    input_size: Sequence[int],
    image_size: int,
    threshold: float,
    iou: Tensor,
) -> None:
    """Write `iou`."""
    for index in range(logits.shape[0]):
        image = _resize(logits[index].to(dtype_of_sums(logits)), (image_size, image_size))
        mask = _resize(image[: input_size[0], : input_size[1]], target.shape) > threshold
        union = (mask | target).sum()
        iou[index] = (mask & target).sum() / union.clamp(min=1)


def _resize(image: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(image[None, None], list(size), mode="bilinear", align_corners=False)[0, 0]
