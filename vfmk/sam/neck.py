"""SAM's neck, whose norms may run as one operator, and whose last one may overwrite some channels
by others: a channel map."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from vfmk import ops
from vfmk.sam import block


class FusedLayerNorm2d(LayerNorm2d):
    """LayerNorm2d as one operator, that of SAM to rounding."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        return self._normalize(x, None)

    def _normalize(self, x: Tensor, index: Tensor | None) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return ops.layer_norm_2d(
            x.to(dtype), self.weight.to(dtype), self.bias.to(dtype), index, eps=self.eps
        )


class MappedLayerNorm2d(FusedLayerNorm2d):
    """The same, some channels of whose output are copies of others: those of FusedLayerNorm2d, bit
    for bit, at no cost."""

    channel_pairs: Tensor  # int64 [2, n]: the channels overwritten, and those that they read
    channel_index: Tensor  # int64 [C]: what each channel reads

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        return self._normalize(x, self.channel_index)


def channel_pairs(encoder: ImageEncoderViT) -> Tensor | None:
    """Of the channel map in force, as in MappedLayerNorm2d; None where there is none."""
    mapped = (n.channel_pairs for n in last_norms(encoder) if isinstance(n, MappedLayerNorm2d))
    return next(mapped, None)


def set_channel_pairs(encoder: ImageEncoderViT, pairs: Tensor | None) -> None:
    """Put this channel map in force, or none; the norms are else as the encoder's attention is,
    fused or SAM's own."""
    _set_norms(encoder, pairs, block.is_fused(encoder))


@contextmanager
def own_norms(encoder: ImageEncoderViT) -> Iterator[None]:
    """SAM's own norms inside the block; after it, the channel map of before and fused norms, in the
    modules of then."""
    pairs = channel_pairs(encoder)
    _set_norms(encoder, None, fused=False)
    try:
        yield
    finally:
        set_channel_pairs(encoder, pairs)


def last_norms(encoder: ImageEncoderViT) -> list[nn.Module]:
    """The neck's last layer, or the neck where it is no sequence of layers. Of what peft has copies
    of, the original and every copy: which of them computes may change at any time."""
    return _last(encoder.neck)


def _set_norms(encoder: ImageEncoderViT, pairs: Tensor | None, fused: bool) -> None:
    for norm in encoder.neck.modules():
        if isinstance(norm, MappedLayerNorm2d):
            del norm.channel_pairs, norm.channel_index
        if type(norm) in (LayerNorm2d, FusedLayerNorm2d, MappedLayerNorm2d):
            norm.__class__ = FusedLayerNorm2d if fused else LayerNorm2d
    if pairs is None:
        return
    for norm in last_norms(encoder):
        assert isinstance(norm, LayerNorm2d)
        index = torch.arange(len(norm.weight), device=norm.weight.device)
        pairs = pairs.to(index.device)
        index[pairs[0]] = pairs[1]
        norm.register_buffer("channel_pairs", pairs, persistent=False)
        norm.register_buffer("channel_index", index, persistent=False)
        norm.__class__ = MappedLayerNorm2d


def _last(module: Any) -> list[nn.Module]:
    if isinstance(module, nn.Sequential):
        return _last(module[-1])
    if hasattr(module, "original_module"):  # in peft's wrapper, beside the copies
        either = (module.original_module, *module.modules_to_save.values())
        return list(chain.from_iterable(map(_last, either)))
    return [module]
