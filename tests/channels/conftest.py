from functools import partial

import numpy as np
import pytest
import torch
from segment_anything import modeling
from torch import nn

from vfmk.data.sample import Sample

CHANNELS = 16


def build_sam(seed: int = 0) -> modeling.Sam:
    """A SAM of 16 channels on images of 32 pixels, at random weights."""
    torch.manual_seed(seed)
    sam = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=32,
            patch_size=4,
            embed_dim=32,
            depth=1,
            num_heads=2,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=0,
            out_chans=CHANNELS,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=CHANNELS,
            image_embedding_size=(8, 8),
            input_image_size=(32, 32),
            mask_in_chans=4,
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer_dim=CHANNELS,
            transformer=modeling.TwoWayTransformer(
                depth=2, embedding_dim=CHANNELS, num_heads=2, mlp_dim=32
            ),
        ),
    )
    return sam.eval()


def build_samples(number: int, seed: int = 0) -> list[Sample]:
    """Discs on noise, of various sizes."""
    random = np.random.default_rng(seed)
    samples = []
    for id in range(number):
        height, width = random.integers(30, 60, 2)
        rows, columns = np.mgrid[:height, :width]
        mask = np.hypot(rows - height / 2, columns - width / 2) < min(height, width) / 3
        image = random.integers(0, 120, (height, width, 3)) + 130 * mask[..., None]
        samples.append(Sample.with_deepest_point(str(id), image.astype(np.uint8), mask))
    return samples


@pytest.fixture(scope="session")
def sam() -> modeling.Sam:
    return build_sam()


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    return build_samples(3)
