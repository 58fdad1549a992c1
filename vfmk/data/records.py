"""Samples in the form in which SAM takes a batch."""

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
    size = sample.mask.shape
    image = np.ascontiguousarray(transform.apply_image(sample.image).transpose(2, 0, 1))
    points = transform.apply_coords(sample.points, size)
    return {
        "image": torch.as_tensor(image, dtype=torch.float32, device=sam.device),
        "original_size": size,
        "point_coords": torch.as_tensor(points, dtype=torch.float32, device=sam.device)[None],
        "point_labels": torch.as_tensor(sample.labels, device=sam.device)[None],
    }


def to_target(sam: "Sam", sample: Sample, record: dict[str, Any], size: torch.Size) -> Tensor:
    """The mask in the frame of the low-resolution logits: [h, w], the share of a cell covered."""
    mask = torch.as_tensor(sample.mask, dtype=torch.float32, device=sam.device)
    height, width = record["image"].shape[-2:]
    mask = F.interpolate(mask[None, None], (height, width), mode="area")
    side = sam.image_encoder.img_size
    mask = F.pad(mask, (0, side - width, 0, side - height))
    return F.interpolate(mask, size, mode="area")[0, 0]
