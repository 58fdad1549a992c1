"""How well low-resolution mask logits fit a target at the original image's size."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vfmk import _backends
from vfmk.ops import _contract, _implementations, _operator

NAME = "mask_iou"


def mask_iou(
    logits: Tensor,
    target: Tensor,
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    image_size: int,
    *,
    threshold: float = 0.0,
) -> Tensor:
    """Intersection over union of each mask, postprocessed as SAM does, with one target.

    No full-size mask is written, and what depends on the target and the sizes alone is computed
    once for all masks. Interpolates in fp32 (fp64 for float64 logits), both steps as one: a pixel
    within rounding of the threshold may fall on the other side than in PyTorch. The same bits on
    each run. No gradient flows. Autocast changes nothing: logits are read in their own dtype.

    Args:
        logits: [K, h, w], finite, float32, float16, bfloat16 or float64; any strides with dense
            columns are read in place.
        target: [H, W], bool, on logits' device.
        input_size: (height, width) of the image as resized for the encoder, before padding, at
            most image_size.
        original_size: (H, W).
        image_size: side of the encoder's square image, in pixels: 1024, or 128 for "tiny".
        threshold: a pixel belongs to the mask if its logit is larger.

    Returns:
        [K] float32; 0 where neither mask nor target has a pixel.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes, sizes or devices that do not fit.

    Equivalent to::

        masks = F.interpolate(logits[:, None], (image_size, image_size), mode="bilinear")
        masks = masks[..., :input_size[0], :input_size[1]]
        masks = F.interpolate(masks, original_size, mode="bilinear")[:, 0] > threshold
        union = (masks | target).sum((1, 2))
        iou = torch.where(union > 0, (masks & target).sum((1, 2)) / union, 0)

    Source: `Sam.postprocess_masks` of segment-anything; the score of a channel-map search.
    """
    _contract.check_tensor(NAME, "logits", logits, "K, h, w")
    _check_target(logits, target)
    input_pair = _contract.int_pair(NAME, "input_size", input_size, minimum=1)
    original_pair = _contract.int_pair(NAME, "original_size", original_size, minimum=1)
    if not isinstance(image_size, int) or isinstance(image_size, bool):
        raise TypeError(f"{NAME}: image_size must be an int, got {image_size!r}")
    side, _ = _contract.int_pair(NAME, "image_size", image_size, minimum=1)
    if side < max(input_pair):
        raise ValueError(f"{NAME}: input_size {input_pair} exceeds image_size {side}")
    if tuple(target.shape) != original_pair:
        raise ValueError(
            f"{NAME}: target has the shape {list(target.shape)}, original_size is {original_pair}"
        )
    if logits.shape[1] < 1 or logits.shape[2] < 1:
        raise ValueError(f"{NAME}: logits has an empty mask, {list(logits.shape)}")
    return _forward(logits.detach(), target, input_pair, side, _checked_threshold(threshold))


def _check_target(logits: Tensor, target: Any) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"{NAME}: target must be a Tensor [H, W], got {type(target).__name__}")
    if target.dtype != torch.bool:
        raise TypeError(
            f"{NAME}: target must be bool, got {str(target.dtype).removeprefix('torch.')}"
        )
    if target.dim() != 2:
        raise ValueError(f"{NAME}: target must have the shape [H, W], got {list(target.shape)}")
    if target.device != logits.device:
        raise ValueError(f"{NAME}: target is on {target.device}, logits is on {logits.device}")


def _checked_threshold(threshold: Any) -> float:
    if not isinstance(threshold, int | float) or isinstance(threshold, bool):
        raise TypeError(f"{NAME}: threshold must be a number, got {threshold!r}")
    if not math.isfinite(threshold):
        raise ValueError(f"{NAME}: threshold must be finite, got {threshold!r}")
    return float(threshold)


@_operator.define(NAME)
def _forward(
    logits: Tensor, target: Tensor, input_size: Sequence[int], image_size: int, threshold: float
) -> Tensor:
    iou = _empty_output(logits, target, input_size, image_size, threshold)
    if logits.shape[0]:
        readable = logits if logits.stride(2) == 1 else logits.contiguous()
        arguments = (readable, target.contiguous(), input_size, image_size, threshold, iou)
        _backends.kernel(NAME, "forward", logits)(*arguments)
    return iou


@_forward.register_fake
def _empty_output(
    logits: Tensor, target: Tensor, input_size: Sequence[int], image_size: int, threshold: float
) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


_implementations.register(NAME, names=("forward",))
