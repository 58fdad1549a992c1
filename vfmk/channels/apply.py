"""A channel map on a SAM, at no cost: the neck's last norm reads by the map as it writes."""

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from vfmk.channels.channel_map import ChannelMap
from vfmk.sam.accelerate import encoder_of

if TYPE_CHECKING:
    from segment_anything.modeling import ImageEncoderViT
    from segment_anything.modeling.common import LayerNorm2d

Model = TypeVar("Model", bound=nn.Module)


def apply(model: Model, map: ChannelMap) -> Model:
    """Let `model` overwrite channels of its image embedding, in place, and return it.

    The neck's last norm runs as `vfmk.ops.layer_norm_2d`, whose write gathers: no pass, copy or
    memory more. Nothing is trained or added. State-dict keys stay; so the map is saved by itself,
    not with the model. It stays until `remove`, whichever adapter is active, vfmk's or peft's, and
    after their `unload`.

    Args:
        model: a `segment_anything` Sam or ImageEncoderViT, an AdaptedSam, or a PeftModel of one;
            plain or accelerated, with LoRA or without, and with a neck in peft's `modules_to_save`.
        map: for as many channels as the embedding has.

    Raises:
        TypeError: `model` is none of these, its neck is not SAM's, or `map` is no ChannelMap.
        ValueError: the map is for another number of channels; the model has a map already.

    Equivalent to, after the encoder, to rounding (of an accelerated one, bit for bit)::

        embedding = embedding[:, map.index]
    """
    from vfmk.sam import neck

    if not isinstance(map, ChannelMap):
        raise TypeError(f"apply: map must be a ChannelMap, got {type(map).__name__}")
    encoder, norms = _with_norms("apply", model)
    if neck.channel_pairs(encoder) is not None:
        raise ValueError("apply: the model has a channel map already; remove it first")
    channels = len(norms[0].weight)
    if channels != map.num_channels:
        raise ValueError(
            f"apply: the map is for {map.num_channels} channels, the embedding has {channels}"
        )
    pairs = torch.tensor(map.pairs, dtype=torch.int64).reshape(-1, 2)
    neck.set_channel_pairs(encoder, pairs.T.contiguous())
    return model


def remove(model: Model) -> Model:
    """Undo `apply`, in place; the outputs are then what they were, bit for bit.

    Raises:
        TypeError: as `apply`.
        ValueError: the model has no map.
    """
    from vfmk.sam import neck

    encoder, _ = _with_norms("remove", model)
    if neck.channel_pairs(encoder) is None:
        raise ValueError("remove: the model has no channel map")
    neck.set_channel_pairs(encoder, None)
    return model


def _with_norms(operator: str, model: nn.Module) -> "tuple[ImageEncoderViT, list[LayerNorm2d]]":
    """The model's encoder and the last norm of its neck, with peft's copies of it."""
    from segment_anything.modeling.common import LayerNorm2d

    from vfmk.sam import neck

    encoder = encoder_of(operator, model)
    norms = neck.last_norms(encoder)
    for norm in norms:
        if type(norm) not in (LayerNorm2d, neck.FusedLayerNorm2d, neck.MappedLayerNorm2d):
            raise TypeError(
                f"{operator}: the neck must end in segment_anything's LayerNorm2d, ends in a"
                f" {type(norm).__name__}"
            )
    return encoder, norms
