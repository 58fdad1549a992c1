"""SAM's encoder on the fused operators, in place, and back."""

from typing import TYPE_CHECKING, TypeVar

from torch import nn

from vfmk.sam.adapt import AdaptedSam
from vfmk.sam.base import image_encoder_of, unwrapped

if TYPE_CHECKING:
    from segment_anything.modeling import ImageEncoderViT

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Let every block of the image encoder attend, and its neck normalize, by vfmk's operators.

    Works in place on a `segment_anything` Sam or ImageEncoderViT, an AdaptedSam, or a PeftModel of
    one of them, and returns it.
    Weights, state-dict keys, dtype, device, mode, hooks, wrapped layers (LoRA on `qkv`) and a
    channel map stay.
    Windows are no longer cut out, padded and merged, and no N×N matrix is stored, forward or
    backward. The encoder then takes images of any size that its patches divide: position
    embeddings are interpolated (bicubic), relative positions too (linear, as SAM does).

    Where the grid ends within a window, SAM attends to qkv of zero tokens: its bias. A `qkv` that
    is wrapped or has hooks is asked for it, by a second call on one zero token.

    Raises:
        TypeError: `model` is none of these.
        ValueError: it is accelerated already, has attention without relative position, or its
            encoder, a block or an attention is of a subclass, whose code would not run.
    """
    from vfmk.sam import block, neck

    encoder = encoder_of("accelerate", model)
    if block.is_fused(encoder):
        raise ValueError("accelerate: the model is accelerated already")
    if foreign := block.foreign_classes(encoder):
        raise ValueError(f"accelerate: not SAM's own classes: {', '.join(foreign)}")
    without = [i for i, b in enumerate(encoder.blocks) if not b.attn.use_rel_pos]
    if without:
        raise ValueError(f"accelerate: blocks {without} have no relative position")
    with neck.own_norms(encoder):
        block.fuse_attention(encoder)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place; the outputs are then what they were, bit for bit. A channel map
    stays.

    Raises:
        TypeError: as `accelerate`.
        ValueError: the model is not accelerated.
    """
    from vfmk.sam import block, neck

    encoder = encoder_of("restore", model)
    if not block.is_fused(encoder):
        raise ValueError("restore: the model is not accelerated")
    with neck.own_norms(encoder):
        block.unfuse_attention(encoder)
    return model


def encoder_of(operator: str, model: nn.Module) -> "ImageEncoderViT":
    from segment_anything.modeling import ImageEncoderViT, Sam

    if isinstance(model, AdaptedSam):
        model = model.sam
    model = unwrapped(model)
    encoder = image_encoder_of(model) if isinstance(model, Sam) else model
    if not isinstance(encoder, ImageEncoderViT):
        raise TypeError(
            f"{operator}: model must be a Sam, an ImageEncoderViT or an AdaptedSam,"
            f" got {type(model).__name__}"
        )
    return encoder
