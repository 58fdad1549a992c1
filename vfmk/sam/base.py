"""A Sam beneath what peft has put into it or around it: tensors and modules by their own names.

peft wraps a layer (`qkv` becomes `qkv.base_layer` beside `qkv.lora_A`) or a whole model, whose
attributes the wrapper then passes on. Here both are seen through, without importing peft.
"""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from segment_anything.modeling import ImageEncoderViT, Sam

PARTS = ("image_encoder.", "prompt_encoder.", "mask_decoder.")  # the rest was attached by others
# An attribute that only this wrapper has, and where in it the wrapped module is.
WRAPPERS = {
    "base_layer": "base_layer",
    "original_module": "original_module",
    "get_base_model": "base_model.model",
}


def unwrapped(module: nn.Module) -> nn.Module:
    """The model in a PeftModel, or the module itself."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]


def image_encoder_of(sam: "Sam") -> "ImageEncoderViT":
    return unwrapped(sam.image_encoder)


def base_tensors(sam: "Sam") -> dict[str, Tensor]:
    """Parameters and buffers by the names that they have without peft; peft's own are left out."""
    inner = _wrappers(sam)
    named = sam.state_dict(keep_vars=True).items()
    return {own: tensor for key, tensor in named if (own := _own_name(key, inner)) is not None}


def peft_layers(sam: "Sam") -> list[str]:
    """Names of the layers that peft computes differently."""
    inner = _wrappers(sam)
    names = {
        _own_name(f"{name}.base_layer", inner)
        for name, module in sam.named_modules()
        if hasattr(module, "base_layer")
    }
    return sorted(filter(None, names))


def module_paths(sam: "Sam") -> list[str]:
    """Names of all submodules, for `sam.get_submodule` and `put_module`."""
    inner = _wrappers(sam)
    names = (_own_name(name, inner) for name, _ in sam.named_modules())
    return list(dict.fromkeys(filter(None, names)))


def put_module(sam: "Sam", path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(unwrapped(sam.get_submodule(parent)), name, module)


def fingerprint(sam: "Sam") -> str:
    """SHA-256 of the names, shapes and values of SAM's own three parts, without peft's tensors.

    Values are rounded to bfloat16 first, so a model cast from float32 to bfloat16 is the same base.
    """
    own = base_tensors(sam).items()
    return fingerprint_of({name: tensor for name, tensor in own if name.startswith(PARTS)})


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and values; values are rounded to bfloat16 first."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(rounded.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _wrappers(sam: "Sam") -> dict[str, str]:
    """The prefix of every wrapper, and of what it wraps; the innermost wrappers first."""
    found = {
        f"{name}.": f"{name}.{inside}."
        for name, module in sam.named_modules()
        for attribute, inside in WRAPPERS.items()
        if hasattr(module, attribute)
    }
    return dict(sorted(found.items(), key=lambda item: len(item[0]), reverse=True))


def _own_name(key: str, inner: dict[str, str]) -> str | None:
    """`key` without the wrappers around it; None for what belongs to a wrapper."""
    path = f"{key}."
    for wrapper, inside in inner.items():
        if path.startswith(wrapper):
            if not path.startswith(inside):
                return None
            path = wrapper + path.removeprefix(inside)
    return path.removesuffix(".")
