"""SAM's neck, whose last norm may overwrite some channels by others: a channel map."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from vfmk import ops


class MappedLayerNorm2d(LayerNorm2d):
    """LayerNorm2d, some channels of whose output are copies of others.

    Same operations in the same order as LayerNorm2d, so a channel keeps its bits wherever it goes;
    but x − mean once instead of twice, and the sum in place, which pays for the copies.
    """

    channel_pairs: Tensor  # int64 [2, n]: the channels overwritten, and those that they read

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        overwritten, read = self.channel_pairs
        x = x - x.mean(1, keepdim=True)
        x = x / torch.sqrt(x.pow(2).mean(1, keepdim=True) + self.eps)
        x = (self.weight[:, None, None] * x).add_(self.bias[:, None, None])
        return x.index_copy_(1, overwritten, ops.channel_remap(x, read))


def channel_pairs(encoder: ImageEncoderViT) -> Tensor | None:
    """Of the channel map in force, as in MappedLayerNorm2d; None where there is none."""
    mapped = (n.channel_pairs for n in last_norms(encoder) if isinstance(n, MappedLayerNorm2d))
    return next(mapped, None)


def set_channel_pairs(encoder: ImageEncoderViT, pairs: Tensor | None) -> None:
    """Put this channel map in force; with None, none, and the norms are as they were."""
    for norm in last_norms(encoder):
        if isinstance(norm, MappedLayerNorm2d):
            norm.__class__ = LayerNorm2d
            del norm.channel_pairs
        if pairs is not None:
            assert isinstance(norm, LayerNorm2d)
            norm.register_buffer("channel_pairs", pairs.to(norm.weight.device), persistent=False)
            norm.__class__ = MappedLayerNorm2d


@contextmanager
def map_stays(encoder: ImageEncoderViT) -> Iterator[None]:
    """No channel map inside the block; after it, that of before, in the norms of then."""
    pairs = channel_pairs(encoder)
    set_channel_pairs(encoder, None)
    try:
        yield
    finally:
        set_channel_pairs(encoder, pairs)


def last_norms(encoder: ImageEncoderViT) -> list[nn.Module]:
    """The neck's last layer, or the neck where it is no sequence of layers. Of what peft has copies
    of, the original and every copy: which of them computes may change at any time."""
    return _last(encoder.neck)


def _last(module: Any) -> list[nn.Module]:
    if isinstance(module, nn.Sequential):
        return _last(module[-1])
    if hasattr(module, "original_module"):  # in peft's wrapper, beside the copies
        either = (module.original_module, *module.modules_to_save.values())
        return list(chain.from_iterable(map(_last, either)))
    return [module]
