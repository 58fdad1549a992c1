"""A channel map on a SAM, at no cost: the gather is part of the write of the neck's last norm."""

from typing import TypeVar

from torch import nn

from vfmk.channels.channel_map import ChannelMap
from vfmk.sam.accelerate import encoder_of

Model = TypeVar("Model", bound=nn.Module)


def apply(model: Model, map: ChannelMap) -> Model:
    """Let `model` overwrite channels of its image embedding, in place, and return it.

    Nothing is trained or added. State-dict keys stay; so the map is saved by itself, not with the
    model.

    Args:
        model: a `segment_anything` Sam or ImageEncoderViT, or an AdaptedSam; plain or accelerated,
            with LoRA or without.
        map: for as many channels as the embedding has.

    Raises:
        TypeError: `model` is none of these, its neck is not SAM's, or `map` is no ChannelMap.
        ValueError: the map is for another number of channels; the model has a map already.

    Equivalent to, after the encoder::

        embedding = embedding[:, map.index]
    """
    from segment_anything.modeling.common import LayerNorm2d

    from vfmk.channels.norm import MappedLayerNorm2d

    if not isinstance(map, ChannelMap):
        raise TypeError(f"apply: map must be a ChannelMap, got {type(map).__name__}")
    norm = encoder_of("apply", model).neck[-1]
    if isinstance(norm, MappedLayerNorm2d):
        raise ValueError("apply: the model has a channel map already; remove it first")
    if type(norm) is not LayerNorm2d:
        raise TypeError(
            "apply: the neck must end in segment_anything's LayerNorm2d, ends in a"
            f" {type(norm).__name__}"
        )
    if len(norm.weight) != map.num_channels:
        raise ValueError(
            f"apply: the map is for {map.num_channels} channels, the embedding has"
            f" {len(norm.weight)}"
        )
    norm.register_buffer("channel_index", map.index.to(norm.weight.device), persistent=False)
    norm.__class__ = MappedLayerNorm2d
    return model


def remove(model: Model) -> Model:
    """Undo `apply`, in place; the outputs are then what they were, bit for bit.

    Raises:
        TypeError: as `apply`.
        ValueError: the model has no map.
    """
    from segment_anything.modeling.common import LayerNorm2d

    from vfmk.channels.norm import MappedLayerNorm2d

    norm = encoder_of("remove", model).neck[-1]
    if not isinstance(norm, MappedLayerNorm2d):
        raise ValueError("remove: the model has no channel map")
    norm.__class__ = LayerNorm2d
    del norm.channel_index
    return model
