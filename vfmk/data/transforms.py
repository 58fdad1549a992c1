"""SAM's square: images with their targets into it, masks and boxes out of it.

The longer side of an image becomes the side of the square; what is left over, at the right or at
the bottom, is padding (`ResizeLongestSide` and `Sam.preprocess` of segment-anything). Training adds
a mirror image and large-scale jitter, https://arxiv.org/abs/2012.07177.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from vfmk.data.dataset import IGNORE, TASKS, Item, Target, TaskName, boxes_around

PIXEL_MEAN = (124, 116, 104)  # SAM's, to the nearest integer: as padding, about 0 once normalised

Window = tuple[int, int, int, int]  # top, left, height, width


def transforms(
    task: TaskName, size: int, train: bool, *, jitter: tuple[float, float] = (0.1, 2.0)
) -> Callable[[tv_tensors.Image, Target], Item]:
    """What takes `(image, target)` of a data set into SAM's square of `size` pixels.

    The image becomes uint8 [3, size, size]; masks bool [n, size, size]; the semantic mask uint8
    [size, size] with padding 255; boxes and points are in pixels of the square. New in the target:
    "input_size", (h, w) of the square that the image fills, and "original_size", (H, W) of the
    file. An object smaller than a pixel of the square keeps one pixel of its mask.

    In training, half of the images are mirrored, and each is scaled by a factor drawn from
    `jitter`, 1 being that which fills the square, and cropped at random to the square. Objects
    outside the crop are dropped, a promptable one always remains; boxes that come with masks are
    drawn anew around what is left of them, and boxes under a pixel in either direction are dropped
    with their labels, masks and crowd flags. A point outside the crop becomes NaN. Random numbers
    are torch's.

    Raises:
        ValueError: an unknown task, a size that is not positive, an empty or negative jitter.
    """
    if task not in TASKS:
        raise ValueError(f"transforms: task must be one of {', '.join(TASKS)}, got {task!r}")
    if size < 1:
        raise ValueError(f"transforms: size must be positive, got {size}")
    if not 0 < jitter[0] <= jitter[1]:
        raise ValueError(f"transforms: jitter must be 0 < low <= high, got {jitter}")
    if not train:
        return Letterbox(size)
    steps: list[nn.Module] = [v2.RandomHorizontalFlip(0.5), Letterbox(size, jitter)]
    if task in ("instance", "detection"):
        steps.append(v2.SanitizeBoundingBoxes(labels_getter=_labels_and_crowd))
    return v2.Compose(steps)


class Letterbox(nn.Module):
    """Into the top left of a square; with `jitter`, a random part at a random scale."""

    def __init__(self, size: int, jitter: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.size = size
        self.jitter = jitter

    def extra_repr(self) -> str:
        return f"size={self.size}, jitter={self.jitter}"

    def forward(self, image: tv_tensors.Image, target: Target) -> Item:
        height, width = image.shape[-2:]
        window: Window = (0, 0, height, width)
        scale = self.size / max(height, width)
        if self.jitter is not None:
            scale *= torch.empty(()).uniform_(*self.jitter).item()
            window = self._window(target, height, width, scale)
        rows, columns = window[2:]
        # As ResizeLongestSide rounds. Cropping before resizing spares the pixels that are cut.
        input_size = (_scaled(rows, scale, self.size), _scaled(columns, scale, self.size))
        target = target | {"input_size": input_size, "original_size": (height, width)}
        target |= self._objects(target, window, input_size)
        # Channels last, as images are read: torch resizes others wrongly to a width of 1.
        part = v2.functional.crop(image, *window).permute(1, 2, 0).contiguous().permute(2, 0, 1)
        resized = v2.functional.resize(part, list(input_size), antialias=True)
        square = torch.tensor(PIXEL_MEAN, dtype=torch.uint8).view(3, 1, 1)
        square = square.repeat(1, self.size, self.size)
        square[:, : input_size[0], : input_size[1]] = resized
        return tv_tensors.Image(square), target

    def _window(self, target: Target, height: int, width: int, scale: float) -> Window:
        """What is shown; of promptable objects, at least one."""
        extent = [min(side, math.ceil(self.size / scale)) for side in (height, width)]
        first, last = [0, 0], [height - extent[0], width - extent[1]]
        if "masks" in target and "boxes" not in target:
            chosen = target["masks"][_random(0, len(target["masks"]) - 1)]
            pixels = chosen.nonzero()
            for axis, at in enumerate(pixels[_random(0, len(pixels) - 1)].tolist()):
                first[axis] = max(0, at - extent[axis] + 1)
                last[axis] = min(last[axis], at)
        return _random(first[0], last[0]), _random(first[1], last[1]), extent[0], extent[1]

    def _objects(self, target: Target, window: Window, input_size: tuple[int, int]) -> Target:
        """All of the target that has a place in the image."""
        top, left, rows, columns = window
        shift = torch.tensor([left, top], dtype=torch.float32)
        ratio = torch.tensor([input_size[1] / columns, input_size[0] / rows])
        edge = torch.tensor([input_size[1], input_size[0]], dtype=torch.float32)
        canvas_size = (self.size, self.size)
        moved: Target = {}
        if "semantic" in target:
            semantic = self._resized(target["semantic"][None], window, input_size, IGNORE)
            moved["semantic"] = tv_tensors.Mask(semantic[0])
        if "boxes" in target:
            boxes = (target["boxes"].as_subclass(Tensor).view(-1, 2, 2) - shift) * ratio
            moved["boxes"] = boxes.clamp(min=torch.zeros(2)).clamp(max=edge).flatten(1)
        if "masks" in target:
            masks = self._masks(target["masks"].as_subclass(Tensor), window, input_size)
            if "boxes" not in target:
                kept = masks.flatten(1).any(1)
                masks = masks[kept]
            elif self.jitter is not None:
                moved["boxes"] = boxes_around(masks)
            moved["masks"] = tv_tensors.Mask(masks)
        if "points" in target:
            points = (target["points"].as_subclass(Tensor) - shift) * ratio
            points[((points < 0) | (points >= edge)).any(1)] = torch.nan
            moved["points"] = tv_tensors.KeyPoints(points[kept], canvas_size=canvas_size)
        if "boxes" in moved:
            moved["boxes"] = tv_tensors.BoundingBoxes(
                moved["boxes"], format="XYXY", canvas_size=canvas_size
            )
        return moved

    def _masks(self, masks: Tensor, window: Window, input_size: tuple[int, int]) -> Tensor:
        """bool [n, H, W] -> bool [n, size, size]"""
        top, left, rows, columns = window
        square = self._resized(masks.view(torch.uint8), window, input_size, 0).bool()
        for mask, small in zip(masks, square, strict=True):
            if not small.any():
                pixels = mask[top : top + rows, left : left + columns].nonzero()
                if len(pixels):
                    y, x = pixels[len(pixels) // 2].tolist()
                    small[y * input_size[0] // rows, x * input_size[1] // columns] = True
        return square

    def _resized(
        self, masks: Tensor, window: Window, input_size: tuple[int, int], fill: int
    ) -> Tensor:
        """uint8 [n, H, W] -> uint8 [n, size, size], the nearest pixel by its centre, as the image
        is resized; v2's resize of a mask goes by corners, half a pixel off."""
        top, left, rows, columns = window
        masks = masks.as_subclass(Tensor)[:, top : top + rows, left : left + columns]
        square = masks.new_full((len(masks), self.size, self.size), fill)
        if len(masks):
            square[:, : input_size[0], : input_size[1]] = F.interpolate(
                masks[None], input_size, mode="nearest-exact"
            )[0]
        return square


def unletterbox(masks: Tensor, input_size: Sequence[int], original_size: Sequence[int]) -> Tensor:
    """Masks in the square back to the original image, as `Sam.postprocess_masks` does.

    Args:
        masks: [..., S, S], logits, or bool.
        input_size: (h, w) of the square that the image fills.
        original_size: (H, W).

    Returns:
        [..., H, W], bilinear; bool, where interpolated bools are above a half, if `masks` is.

    Equivalent to:
        F.interpolate(masks[..., :h, :w], (H, W), mode="bilinear", align_corners=False)
    """
    inside = masks[..., : input_size[0], : input_size[1]]
    planes = inside.reshape(1, -1, *inside.shape[-2:])
    size = (original_size[0], original_size[1])
    if planes.shape[1] == 0:
        return inside.new_empty((*inside.shape[:-2], *size))
    if masks.dtype == torch.bool:
        planes = F.interpolate(planes.float(), size, mode="bilinear") > 0.5
    else:
        planes = F.interpolate(planes, size, mode="bilinear")
    return planes.view(*inside.shape[:-2], *size)


def unletterbox_boxes(
    boxes: Tensor, input_size: Sequence[int], original_size: Sequence[int]
) -> Tensor:
    """Boxes [..., 4], XYXY in pixels of the square, in pixels of the original and clipped to it."""
    height, width = original_size
    ratio = boxes.new_tensor([width / input_size[1], height / input_size[0]]).repeat(2)
    edge = boxes.new_tensor([width, height]).repeat(2)
    return (boxes * ratio).clamp(min=torch.zeros_like(edge)).clamp(max=edge)


def collate(batch: Sequence[Item]) -> tuple[Tensor, list[Target]]:
    """Images uint8 [B, 3, S, S] and the list of their targets."""
    return torch.stack([image.as_subclass(Tensor) for image, _ in batch]), [t for _, t in batch]


def _scaled(length: int, scale: float, size: int) -> int:
    return min(size, max(1, int(length * scale + 0.5)))


def _random(low: int, high: int) -> int:
    """Uniform, both ends included."""
    return int(torch.randint(low, high + 1, ()))


def _labels_and_crowd(sample: Any) -> tuple[Tensor, Tensor]:
    return sample[1]["labels"], sample[1]["iscrowd"]
