"""Samples in the form in which SAM takes a batch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vfmk.data.sample import Sample

if TYPE_CHECKING:
    from segment_anything.modeling import Sam


def to_record(sam: "Sam", sample: Sample) -> dict[str, Any]:
    """One image with one prompt, on the model's device, as `Sam.forward` takes it.

    The image is resized so that its long side is the encoder's; points move along.
    """
    from segment_anything.utils.transforms import ResizeLongestSide

    transform = ResizeLongestSide(sam.image_encoder.img_size)
    image = np.ascontiguousarray(transform.apply_image(sample.image).transpose(2, 0, 1))
    coords, labels = to_points(sam, sample)
    return {
        "image": torch.as_tensor(image, dtype=torch.float32, device=sam.device),
        "original_size": sample.mask.shape,
        "point_coords": coords,
        "point_labels": labels,
    }


def to_points(sam: "Sam", sample: Sample) -> tuple[Tensor, Tensor]:
    """The prompt, on the model's device: float32 [1, P, 2] on the resized image, int64 [1, P]."""
    from segment_anything.utils.transforms import ResizeLongestSide

    transform = ResizeLongestSide(sam.image_encoder.img_size)
    points = transform.apply_coords(sample.points, sample.mask.shape)
    coords = torch.as_tensor(points, dtype=torch.float32, device=sam.device)
    return coords[None], torch.tensor(sample.labels, device=sam.device)[None]


def to_target(sam: "Sam", sample: Sample, input_size: Sequence[int], size: Sequence[int]) -> Tensor:
    """The mask in the frame of the low-resolution logits: [h, w], the share of a cell covered.

    Args:
        input_size: height and width of the resized image.
        size: h, w.
    """
    mask = torch.as_tensor(sample.mask, dtype=torch.float32, device=sam.device)
    height, width = input_size
    mask = F.interpolate(mask[None, None], (height, width), mode="area")
    side = sam.image_encoder.img_size
    mask = F.pad(mask, (0, side - width, 0, side - height))
    return F.interpolate(mask, tuple(size), mode="area")[0, 0]
