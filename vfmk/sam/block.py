"""SAM's transformer block with adapters beside its sub-layers."""

from collections.abc import Iterable

from segment_anything.modeling.image_encoder import (
    Block,
    ImageEncoderViT,
    window_partition,
    window_unpartition,
)
from torch import Tensor

from vfmk.nn.vfm_adapter import VFMAdapterStack


class AdaptedBlock(Block):
    """y = x + Attn(LN1 x) + s·A_attn(LN1 x), then y + MLP(LN2 y) + s·A_mlp(LN2 y).

    A block takes this class in place and gives it back, so parameters, state-dict keys, hooks and
    modes are those of the block it was. The adapters see the whole grid, before windows are cut.
    """

    # In a tuple, so that the base does not register what belongs to AdaptedSam.
    _adapters: tuple[VFMAdapterStack, ...] = ()
    _layer: int

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm1(x)
        x = x + self._attend(u)
        for adapters in self._adapters:
            x = adapters(x, u, self._layer, "attn")
        u = self.norm2(x)
        x = x + self.mlp(u)
        for adapters in self._adapters:
            x = adapters(x, u, self._layer, "mlp")
        return x

    def _attend(self, u: Tensor) -> Tensor:
        if self.window_size == 0:
            return self.attn(u)
        windows, padded_size = window_partition(u, self.window_size)
        return window_unpartition(
            self.attn(windows), self.window_size, padded_size, (u.shape[1], u.shape[2])
        )


def insert_adapters(encoder: ImageEncoderViT, adapters: VFMAdapterStack) -> None:
    """Put `adapters` beside the sub-layers of the encoder's blocks."""
    for layer, block in enumerate(encoder.blocks):
        block.__class__ = AdaptedBlock
        block._layer = layer
    enable_adapters(encoder.blocks, adapters)


def enable_adapters(blocks: Iterable[AdaptedBlock], adapters: VFMAdapterStack | None) -> None:
    """Compute with `adapters`, or, with None, as the base does."""
    for block in blocks:
        block._adapters = () if adapters is None else (adapters,)


def remove_adapters(encoder: ImageEncoderViT) -> None:
    """Make every block the plain Block that it was."""
    for block in encoder.blocks:
        del block._adapters, block._layer
        block.__class__ = Block


def is_adapted(encoder: ImageEncoderViT) -> bool:
    return any(isinstance(block, AdaptedBlock) for block in encoder.blocks)


def is_known(block: Block) -> bool:
    """Whether the block computes as SAM's own does; a subclass may not."""
    return type(block) in (Block, AdaptedBlock)
