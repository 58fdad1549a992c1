"""The Triton kernel of mask_iou, interpreted, against SAM's own two interpolations."""

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.interpreter import interpreted
from tests.ops.test_mask_iou import blobs, bounds, disc, full_size
from vfmk.kernels import mask_iou as kernels

GEOMETRIES = [  # low resolution, image size, input size, original size
    ((32, 32), 128, (96, 128), (60, 80)),
    ((32, 32), 128, (128, 86), (101, 70)),
    ((32, 32), 128, (128, 128), (9, 10)),  # a tile looks at more than it may hold
    ((40, 70), 24, (20, 24), (31, 65)),
    ((1, 1), 8, (5, 8), (11, 67)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("low", "image_size", "input_size", "original"), GEOMETRIES, ids=str)
@interpreted
def test_equals_sam(low, image_size, input_size, original, dtype):
    logits = torch.cat([blobs(4, *low), torch.randn(1, *low)]).to(dtype)
    target = disc(*original)
    iou = torch.full((5,), torch.nan)
    kernels.forward(logits, target, input_size, image_size, 0.5, iou)
    masks = full_size(logits.float(), input_size, original, image_size)
    least, greatest = bounds(masks, target, 0.5)
    assert (iou >= least - 1e-6).all()
    assert (iou <= greatest + 1e-6).all()


@interpreted
def test_view_and_empty_union():
    logits = torch.full((4, 40, 80), -1.0)[::2, 4:36, 7:39]
    iou = torch.full((2,), torch.nan)
    kernels.forward(logits, torch.zeros(60, 80) > 0, (96, 128), 128, 0.0, iou)
    assert iou.tolist() == [0, 0]
