"""The whole ViT-B encoder, accelerated, against segment_anything's own at several image sizes."""

from functools import partial

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

import vfmk
from tests.operator_checks import relative_error

SIZES = [(1024, 1024), (768, 768), (512, 1024)]
FP32_LIMIT = 1e-4  # over twelve blocks; one block loses 2e-5 at most


def vit_b(depth: int, global_attn_indexes: tuple[int, ...]) -> ImageEncoderViT:
    """ViT-B, or its first blocks; tables and position embedding are not zero, as in SAM."""
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        depth=depth,
        global_attn_indexes=global_attn_indexes,
        embed_dim=768,
        num_heads=12,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
    ).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "rel_pos" in name:
                parameter.normal_(std=0.3)
            elif name == "pos_embed":
                parameter.normal_(std=0.5)
    return encoder


def eager(encoder: ImageEncoderViT, images: Tensor) -> Tensor:
    """segment_anything adds the position embedding as it is: it gets the one of this size."""
    grid = (images.shape[2] // 16, images.shape[3] // 16)
    pos_embed = encoder.pos_embed
    if grid != pos_embed.shape[1:3]:
        resized = nn.functional.interpolate(pos_embed.permute(0, 3, 1, 2), grid, mode="bicubic")
        pos_embed = resized.permute(0, 2, 3, 1)
    return torch.func.functional_call(encoder, {"pos_embed": pos_embed}, images)


@torch.no_grad()
def check(encoder: ImageEncoderViT, size: tuple[int, int]) -> None:
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = eager(encoder, images)
    accelerated = vfmk.accelerate(encoder)(images)
    assert relative_error(accelerated, expected) <= FP32_LIMIT
    assert torch.equal(eager(vfmk.restore(encoder), images), expected)


@pytest.fixture(scope="module")
def two_blocks():
    return vit_b(depth=2, global_attn_indexes=(1,))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_two_blocks(two_blocks, size):
    check(two_blocks, size)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_twelve_blocks(size):
    check(vit_b(depth=12, global_attn_indexes=(2, 5, 8, 11)), size)
