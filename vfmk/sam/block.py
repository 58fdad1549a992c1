"""SAM's encoder with what vfmk puts into it: fused attention, adapters beside the sub-layers.

Modules take these classes in place (`module.__class__`) and give them back, so parameters,
state-dict keys, hooks, modes and wrapped layers are those of the modules they were.
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import (
    Attention,
    Block,
    ImageEncoderViT,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vfmk import ops
from vfmk.nn.vfm_adapter import VFMAdapterStack


class FusedAttention(Attention):
    """Attention on the whole, unpadded grid, in windows of `_window_size` (0: global).

    Where the grid ends within a window, SAM pads with zero tokens, and what they attend with is
    the bias of `qkv`. A wrapped or hooked `qkv` is called a second time, on one zero token.
    """

    _window_size: int

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] → [B, H, W, C]."""
        grid_size = (x.shape[1], x.shape[2])
        window = (self._window_size, self._window_size) if self._window_size else grid_size
        qkv = self.qkv(x)
        attended = ops.window_rel_pos_attention(
            qkv,
            self._padding(x, qkv, window),
            self.rel_pos_h,
            self.rel_pos_w,
            window,
            self.num_heads,
            scale=self.scale,
        )
        return self.proj(attended)

    def _padding(self, x: Tensor, qkv: Tensor, window: tuple[int, int]) -> Tensor:
        """What SAM's zero-padded tokens become: qkv of zero, [3·C]."""
        if x.shape[1] % window[0] == 0 and x.shape[2] % window[1] == 0:
            return qkv.new_zeros(qkv.shape[-1])
        if _is_plain_linear(self.qkv) and self.qkv.bias is not None:
            return self.qkv.bias
        return self.qkv(x.new_zeros(1, x.shape[-1]))[0]  # wrapped, by peft for example


class VfmkBlock(Block):
    """y = x + Attn(LN1 x) + s·A_attn(LN1 x), then y + MLP(LN2 y) + s·A_mlp(LN2 y).

    Without adapters, SAM's own block. The adapters see the whole grid, before windows are cut.
    """

    # In a tuple, so that the base does not register what belongs to AdaptedSam.
    _adapters: tuple[VFMAdapterStack, ...] = ()
    _layer: int
    _checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        if self._checkpointed and torch.is_grad_enabled():
            # The backward computes with these adapters, whichever are active by then.
            return checkpoint(self._compute, x, self._adapters, use_reentrant=False)
        return self._compute(x, self._adapters)

    def _compute(self, x: Tensor, stacks: tuple[VFMAdapterStack, ...]) -> Tensor:
        u = self.norm1(x)
        x = x + self._attend(u)
        for stack in stacks:
            x = stack(x, u, self._layer, "attn")
        u = self.norm2(x)
        x = x + self.mlp(u)
        for stack in stacks:
            x = stack(x, u, self._layer, "mlp")
        return x

    def _attend(self, u: Tensor) -> Tensor:
        if self.window_size == 0 or isinstance(self.attn, FusedAttention):
            return self.attn(u)
        windows, padded_size = window_partition(u, self.window_size)
        return window_unpartition(
            self.attn(windows), self.window_size, padded_size, (u.shape[1], u.shape[2])
        )


class AcceleratedEncoder(ImageEncoderViT):
    """The encoder for images of any size that patches divide."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, C, H / patch, W / patch]."""
        patch = self.patch_embed.proj.stride
        if x.shape[2] % patch[0] or x.shape[3] % patch[1]:
            raise ValueError(
                f"accelerate: the image is {x.shape[2]}×{x.shape[3]}; patches of"
                f" {patch[0]}×{patch[1]} do not divide it"
            )
        # A permuted view; sums would keep its strides, and each LayerNorm copy them straight.
        x = self.patch_embed(x).contiguous()
        if self.pos_embed is not None:
            x = x + _resized(self.pos_embed, (x.shape[1], x.shape[2]))
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether the module is its weight and bias alone: no subclass, no hook on its values."""
    return type(module) is nn.Linear and not (module._forward_pre_hooks or module._forward_hooks)


def _resized(pos_embed: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """The position embedding [1, H, W, C] on another grid, bicubic."""
    if pos_embed.shape[1:3] == grid_size:
        return pos_embed
    image = pos_embed.permute(0, 3, 1, 2)
    return F.interpolate(image, grid_size, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)


def fuse_attention(encoder: ImageEncoderViT) -> None:
    """Put the fused operators into the encoder's attention."""
    encoder.__class__ = AcceleratedEncoder
    for block in encoder.blocks:
        block.__class__ = VfmkBlock
        block.attn._window_size = block.window_size
        block.attn.__class__ = FusedAttention


def unfuse_attention(encoder: ImageEncoderViT) -> None:
    """Give the encoder its own attention back."""
    encoder.__class__ = ImageEncoderViT
    for block in encoder.blocks:
        del block.attn._window_size
        block.attn.__class__ = Attention
        _give_back(block)


def insert_adapters(encoder: ImageEncoderViT, adapters: VFMAdapterStack) -> None:
    """Put `adapters` beside the sub-layers of the encoder's blocks."""
    for layer, block in enumerate(encoder.blocks):
        block.__class__ = VfmkBlock
        block._layer = layer
    enable_adapters(encoder, adapters)


def enable_adapters(encoder: ImageEncoderViT, adapters: VFMAdapterStack | None) -> None:
    """Compute with `adapters`, or, with None, as the base does."""
    for block in encoder.blocks:
        block._adapters = () if adapters is None else (adapters,)


def checkpoint_blocks(encoder: ImageEncoderViT, on: bool) -> None:
    """Keep the input of each block alone for the backward, which computes the rest again."""
    for block in encoder.blocks:
        block._checkpointed = on


def remove_adapters(encoder: ImageEncoderViT) -> None:
    """Take the adapters out for good."""
    for block in encoder.blocks:
        del block._adapters, block._layer
        vars(block).pop("_checkpointed", None)
        _give_back(block)


def is_fused(encoder: ImageEncoderViT) -> bool:
    return isinstance(encoder, AcceleratedEncoder)


def is_adapted(encoder: ImageEncoderViT) -> bool:
    return any("_adapters" in vars(block) for block in encoder.blocks)


def foreign_classes(encoder: ImageEncoderViT) -> list[str]:
    """The encoder, blocks and attentions that compute by code of their own, as "block 0 is X"."""
    found = []
    if type(encoder) is not ImageEncoderViT:
        found.append(f"the encoder is {type(encoder).__name__}")
    for index, block in enumerate(encoder.blocks):
        if not is_known(block):
            found.append(f"block {index} is {type(block).__name__}")
        if type(block.attn) is not Attention:
            found.append(f"block {index}'s attn is {type(block.attn).__name__}")
    return found


def is_known(block: Block) -> bool:
    """Whether the block computes as SAM's own does; a subclass may not."""
    return type(block) in (Block, VfmkBlock)


def _give_back(block: Block) -> None:
    """Make the block a plain Block again, unless it is still needed otherwise."""
    if "_adapters" not in vars(block) and not isinstance(block.attn, FusedAttention):
        block.__class__ = Block
