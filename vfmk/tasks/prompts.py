"""Prompts drawn from masks, and SAM's decoder for a batch of images that have some each."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

if TYPE_CHECKING:
    from segment_anything.modeling import Sam


def draw_point(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """A point inside `mask`, anywhere or, half the time, away from its edge: float32 (x, y)."""
    if rng.random() < 0.5:
        depth = ndimage.distance_transform_edt(mask)
        mask = depth > 0.7 * depth.max()
    y, x = np.nonzero(mask)
    chosen = rng.integers(len(y))
    return np.array([x[chosen], y[chosen]], np.float32)


def draw_box(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """The bounding box of `mask` with its corners shaken a little: float32 (x0, y0, x1, y1)."""
    y, x = np.nonzero(mask)
    box = np.array([x.min(), y.min(), x.max(), y.max()], np.float32)
    reach = 0.05 * np.tile([box[2] - box[0], box[3] - box[1]], 2) + 0.5
    return (box + rng.uniform(-1, 1, 4) * reach).astype(np.float32)


def decode(
    sam: "Sam", embedding: Tensor, point: Tensor, box: Tensor, is_box: Tensor
) -> tuple[Tensor, Tensor]:
    """All mask tokens' logits [B*P, 4, h, w] and predicted IoU [B*P, 4], differentiable.

    Every parameter of the mask decoder takes part, and every one of the prompt encoder but those
    for mask prompts.

    Args:
        embedding: [B, C, H, W], what the image encoder gives.
        point: float32 [B, P, 2], (x, y) in pixels of the encoder's input, all on the object.
        box: float32 [B, P, 4], (x0, y0, x1, y1).
        is_box: bool [B, P]; where true the box is the prompt, elsewhere the point.
    """
    with torch.autocast(embedding.device.type, enabled=False):  # bf16 would blur the coordinates
        points, boxes = point.flatten(0, 1), box.flatten(0, 1)
        label = torch.ones_like(points[:, :1])
        from_point, dense = sam.prompt_encoder((points[:, None], label), None, None)
        from_box, _ = sam.prompt_encoder(None, boxes, None)
        image_pe = sam.prompt_encoder.get_dense_pe()
    # The decoder repeats one image embedding for its prompts and adds the dense prompts to it;
    # a batch of images gets through as dense prompts.
    dense = dense + embedding.repeat_interleave(point.shape[1], dim=0)
    return sam.mask_decoder.predict_masks(
        image_embeddings=torch.zeros_like(embedding[:1]),
        image_pe=image_pe,
        sparse_prompt_embeddings=torch.where(is_box.flatten()[:, None, None], from_box, from_point),
        dense_prompt_embeddings=dense,
    )
