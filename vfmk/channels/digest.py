"""Which model and which samples a file of scores is of."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def digest_of_model(model: Any) -> str:
    """SHA-256 of its modules, parameters and buffers; of a function only the name."""
    items: list[tuple[str, Any]] = [("", name_of(model))]
    for module in modules_of(model):
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        items += [("", type(module).__name__ + module.extra_repr()), *tensors]
    return _digest(items)


def digest_of_samples(samples: Sequence[Any]) -> str:
    """SHA-256 of all their attributes."""
    return _digest([item for sample in samples for item in sorted(vars(sample).items())])


def modules_of(model: Any) -> list[nn.Module]:
    """The model's, and those of the adapters in force, which a Sam does not own."""
    if not isinstance(model, nn.Module):
        return []
    stacks = {stack for module in model.modules() for stack in vars(module).get("_adapters", ())}
    return [*model.modules(), *(module for stack in stacks for module in stack.modules())]


def name_of(model: Any) -> str:
    return getattr(model, "__qualname__", type(model).__qualname__)


def _digest(items: Iterable[tuple[str, Any]]) -> str:
    """Of named tensors, arrays, strings and numbers; of other values the name."""
    digest = hashlib.sha256()
    for name, value in items:
        digest.update(name.encode())
        if isinstance(value, str | int | float):
            digest.update(repr(value).encode())
        elif isinstance(value, Tensor):
            digest.update(
                value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            )
        elif hasattr(value, "tobytes"):
            digest.update(value.tobytes())
    return digest.hexdigest()
