"""What a search refuses, by name."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vfmk.sam.adapt import AdaptedSam
from vfmk.sam.base import unwrapped

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

    from vfmk.data.sample import Sample

STRATEGIES = ("exhaustive", "screened")


def check_arguments(
    samples: Sequence[Any], top_n: int, strategy: str, keep: float | None, audit: int
) -> None:
    if not isinstance(samples, Sequence):
        raise TypeError(f"search: samples must be a sequence, got {type(samples).__name__}")
    if not samples:
        raise ValueError("search: no samples")
    if strategy not in STRATEGIES:
        raise ValueError(
            f"search: strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}"
        )
    for name, value in {"top_n": top_n, "audit": audit}.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"search: {name} must be an int, got {value!r}")
    if not isinstance(keep, float | int | None):
        raise TypeError(f"search: keep must be a number, got {keep!r}")
    if not 1 <= top_n <= 16:
        raise ValueError(f"search: top_n must be from 1 to 16, got {top_n}")
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"search: keep must be in (0, 1], got {keep}")
    if audit < 0:
        raise ValueError(f"search: audit must be at least 0, got {audit}")
    if strategy == "exhaustive" and (audit or keep is not None):
        raise ValueError('search: keep and audit go with strategy="screened"')


def sam_of(model: Any) -> "Sam":
    """The Sam in an AdaptedSam or a PeftModel, or the model itself."""
    from segment_anything.modeling import Sam

    sam = unwrapped(model.sam if isinstance(model, AdaptedSam) else model)
    if not isinstance(sam, Sam):
        raise TypeError(
            "search: without a score_fn, model must be a Sam or an AdaptedSam,"
            f" got {type(model).__name__}"
        )
    for name, parameter in sam.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(f"search: the model must be in float32, {name} is in {parameter.dtype}")
    return sam


def check_encoder(model: Any) -> None:
    if not callable(model):
        raise TypeError(f"search: model must be an encoder, got a {type(model).__name__}")
    if isinstance(model, AdaptedSam) or hasattr(model, "mask_decoder"):
        raise TypeError(
            "search: with a score_fn, model must give features; of a Sam take the image_encoder"
        )


def check_modules(modules: Sequence[nn.Module], strategy: str) -> None:
    # Told by its buffer's name: segment_anything need not be installed for another encoder.
    if any(hasattr(module, "channel_pairs") for module in modules):
        raise ValueError("search: the model has a channel map; remove it first")
    parameters = (p for module in modules for p in module.parameters(recurse=False))
    if strategy == "screened" and any(p.is_inference() for p in parameters):
        raise ValueError(
            'search: strategy="screened" takes gradients, but the model was made under'
            " inference_mode"
        )


def check_sample(sample: "Sample") -> None:
    """That it is as `load_samples` gives them."""
    name = f"search: sample {sample.id!r}"
    if sample.mask.ndim != 2 or sample.mask.dtype != bool:
        raise ValueError(
            f"{name} must have a bool mask, has {sample.mask.dtype} {list(sample.mask.shape)}"
        )
    height, width = sample.mask.shape
    if sample.image.ndim != 3 or sample.image.shape[2] != 3 or sample.image.dtype != "uint8":
        raise ValueError(
            f"{name} must have a uint8 image [H, W, 3], has {sample.image.dtype}"
            f" {list(sample.image.shape)}"
        )
    if sample.image.shape[:2] != (height, width):
        raise ValueError(f"{name}: image and mask differ in size")
    if not sample.mask.any():
        raise ValueError(f"{name} has an empty mask")
    if not len(sample.points):
        raise ValueError(f"{name} has no points")
    if len(sample.labels) != len(sample.points):
        raise ValueError(f"{name} has {len(sample.points)} points, {len(sample.labels)} labels")
    if not set(sample.labels.tolist()) <= {0, 1}:
        raise ValueError(f"{name} has a label that is neither 0 nor 1: {sample.labels.tolist()}")
    x, y = sample.points.T
    if not ((x >= 0) & (x < width) & (y >= 0) & (y < height)).all():
        raise ValueError(f"{name} has a point outside its image")


def check_image(sample: Any) -> None:
    """That an encoder can be given its image."""
    image = getattr(sample, "image", None)
    if not isinstance(image, Tensor):
        raise TypeError(
            f"search: with a score_fn a sample must have a Tensor as its image, got"
            f" {type(image).__name__}"
        )
