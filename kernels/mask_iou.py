"""Intersection over union of upsampled masks with one target, in Triton.

    mask[k] = resize(resize(logits[k] to S x S) cut to the input's size to H x W) > threshold

with PyTorch's bilinear interpolation, without aligned corners. `forward` expects checked and
allocated arguments, logits [K, h, w] with dense columns.

Mapping. A program owns a band of BLOCK_Y rows of one mask and walks over it in tiles, BLOCK_X
wide. Each interpolation mixes two rows and two columns of its source, so a pixel is a mix of up to
16 logits, and lies between the least and the greatest of them. A tile first reads its neighbourhood
in low resolution, NEAR_Y x NEAR_X logits: if all are above the threshold it only counts target
pixels, if none is it does nothing, and only where a contour passes are pixels computed, from logits
in the first-level cache. Where the neighbourhood is larger than that (the mask is reduced), every
pixel is computed.

Bytes from memory, for logits of s bytes: Khws; the target is re-read from cache for each mask. The
programs' counts are integers, so their sum does not depend on an order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["forward", "not_supported"]

BLOCK_Y, BLOCK_X = 8, 64  # pixels of a tile
NEAR_Y, NEAR_X = 8, 32  # logits that a tile looks at before it computes


@triton.jit
def _source(position, source_size, target_size):
    """The two neighbours that an interpolated position reads, and the share of the second."""
    ratio = tl.cast(source_size, tl.float32) / tl.cast(target_size, tl.float32)
    at = tl.maximum(ratio * (position.to(tl.float32) + 0.5) - 0.5, 0.0)
    low = tl.minimum(at.to(tl.int32), source_size - 1)
    high = tl.minimum(low + 1, source_size - 1)
    return low, high, tl.minimum(at - low.to(tl.float32), 1.0)


@triton.jit
def _taps(position, target_size, input_size, image_size, low_size):
    """Two interpolations in a row: four positions in low resolution and their weights."""
    near, far, share = _source(position, input_size, target_size)
    a, b, s = _source(near, low_size, image_size)
    c, d, t = _source(far, low_size, image_size)
    return a, b, c, d, (1 - share) * (1 - s), (1 - share) * s, share * (1 - t), share * t


@triton.jit
def _mix(pointers, columns, weights, mask):
    """One row of low resolution, interpolated: [Y, X] from rows [Y, 1] and columns [X]."""
    total = tl.load(pointers + columns[0][None, :], mask=mask, other=0).to(tl.float32)
    total *= weights[0][None, :]
    for n in tl.static_range(1, 4):
        value = tl.load(pointers + columns[n][None, :], mask=mask, other=0).to(tl.float32)
        total += value * weights[n][None, :]
    return total


@triton.jit(do_not_specialize=["mask_stride", "row_stride", "threshold"])
def _count_kernel(
    logits, target, counts, threshold, mask_stride, row_stride,
    low_height, low_width, image_size, input_height, input_width, height, width,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, NEAR_Y: tl.constexpr, NEAR_X: tl.constexpr,
):  # fmt: skip
    bands = tl.cdiv(height, BLOCK_Y)
    mask_index = (tl.program_id(0) // bands).to(tl.int64)
    y = tl.program_id(0) % bands * BLOCK_Y + tl.arange(0, BLOCK_Y)
    logits += mask_index * mask_stride
    row_stride = row_stride.to(tl.int64)
    # Beyond the edge the last row and column again, whose results nobody counts.
    rows = _taps(tl.minimum(y, height - 1), height, input_height, image_size, low_height)
    top = tl.min(rows[0])
    bottom = tl.max(rows[3])
    near_row = top + tl.arange(0, NEAR_Y)

    area = tl.zeros([BLOCK_Y, BLOCK_X], tl.int32)
    intersection = tl.zeros([BLOCK_Y, BLOCK_X], tl.int32)
    for start in range(0, width, BLOCK_X):
        x = start + tl.arange(0, BLOCK_X)
        columns = _taps(tl.minimum(x, width - 1), width, input_width, image_size, low_width)
        left = tl.min(columns[0])
        right = tl.max(columns[3])
        near_column = left + tl.arange(0, NEAR_X)
        looked_at = (near_row <= bottom)[:, None] & (near_column <= right)[None, :]
        near = tl.load(
            logits + near_row[:, None] * row_stride + near_column[None, :],
            mask=looked_at, other=0,
        ).to(tl.float32)  # fmt: skip
        above = tl.sum(tl.sum((looked_at & (near > threshold)).to(tl.int32), 1), 0)
        complete = (bottom - top < NEAR_Y) & (right - left < NEAR_X)
        exists = (y < height)[:, None] & (x < width)[None, :]
        if (above > 0) | (complete == 0):
            pixels = target + y.to(tl.int64)[:, None] * width + x[None, :]
            wanted = tl.load(pixels, mask=exists, other=0).to(tl.int32)
            inside = exists.to(tl.int32)
            if (above < (bottom - top + 1) * (right - left + 1)) | (complete == 0):
                value = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
                for n in tl.static_range(4):
                    pointers = logits + rows[n][:, None] * row_stride
                    mixed = _mix(pointers, columns[:4], columns[4:], exists)
                    value += mixed * rows[4 + n][:, None]
                inside = (exists & (value > threshold)).to(tl.int32)
            area += inside
            intersection += inside * wanted
    tl.store(counts + tl.program_id(0) * 2, tl.sum(tl.sum(area, 1), 0))
    tl.store(counts + tl.program_id(0) * 2 + 1, tl.sum(tl.sum(intersection, 1), 0))


def not_supported(logits: Tensor) -> str:
    """Nothing is against logits of a dtype that the operator hands on."""
    return ""


def forward(
    logits: Tensor,
    target: Tensor,
    input_size: Sequence[int],
    image_size: int,
    threshold: float,
    iou: Tensor,
) -> None:
    masks, low_height, low_width = logits.shape
    height, width = target.shape
    bands = triton.cdiv(height, BLOCK_Y)
    with torch.cuda.device_of(logits):
        counts = torch.empty((masks, bands, 2), dtype=torch.int32, device=logits.device)
        _count_kernel[masks * bands,](
            *(logits, target.view(torch.uint8), counts, threshold),
            *(logits.stride(0), logits.stride(1), low_height, low_width, image_size),
            *(input_size[0], input_size[1], height, width),
            *(BLOCK_Y, BLOCK_X, NEAR_Y, NEAR_X),
        )
        area, intersection = counts.sum(1).unbind(1)
        union = area + target.sum() - intersection
        iou.copy_(intersection / union.clamp(min=1))
