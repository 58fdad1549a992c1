"""Which model and samples a file of scores is of."""

import hashlib
from collections.abc import Iterator, Sequence
from enum import Enum
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

VALUES = str | bytes | int | float | complex | Enum | None  # told apart by their repr
OF_MODULE = frozenset(vars(nn.Module()))  # attributes that every module has


def digest_of_model(model: nn.Module) -> str:
    """SHA-256 of its modules, their parameters, buffers and plain attributes: those that hold
    values, tensors, arrays and containers of them. Code counts by the names of classes."""
    parts: list[Any] = []
    for module in modules_of(model):
        parts.append(type(module).__name__ + module.extra_repr())
        parts += module.named_parameters(recurse=False)
        parts += module.named_buffers(recurse=False)
        own = {k: v for k, v in vars(module).items() if k not in OF_MODULE and _is_plain(v)}
        parts.append(own)
    return _digest(parts, "model")


def digest_of_samples(samples: Sequence[Any]) -> str:
    """SHA-256 of all that they hold.

    Raises:
        ValueError: naming what cannot be told apart from others of its type.
    """
    digest = hashlib.sha256()
    for number, sample in enumerate(samples):
        try:
            digest.update(_digest(sample, f"sample {number}").encode())
        except RuntimeError as error:  # it holds itself, or a tensor without plain memory
            raise ValueError(f"search: sample {number} cannot be told apart: {error}") from None
    return digest.hexdigest()


def modules_of(model: Any) -> list[nn.Module]:
    """The model's, and those of the adapters in force, which a Sam does not own."""
    if not isinstance(model, nn.Module):
        return []
    stacks = {stack for module in model.modules() for stack in vars(module).get("_adapters", ())}
    return [*model.modules(), *(module for stack in stacks for module in stack.modules())]


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    is_plain = isinstance(value, VALUES | Tensor | np.ndarray) and not _has_objects(value)
    return is_plain and not isinstance(value, nn.Parameter)


def _digest(value: Any, place: str) -> str:
    digest = hashlib.sha256()
    for part in _parts(value, place):
        digest.update(f"{len(part)}:".encode())
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any, place: str) -> Iterator[Any]:
    """Bytes that say all of `value`; `place` is where it is, for an error."""
    yield type(value).__qualname__.encode()
    if isinstance(value, VALUES):
        yield repr(value).encode()
    elif isinstance(value, Tensor):
        yield f"{value.dtype}{list(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    elif isinstance(value, PathLike):
        yield repr(fspath(value)).encode()
    elif isinstance(value, list | tuple):
        yield str(len(value)).encode()
        for number, item in enumerate(value):
            yield from _parts(item, f"{place}[{number}]")
    elif not isinstance(value, dict) and hasattr(value, "tobytes") and not _has_objects(value):
        form = [getattr(value, name, None) for name in ("dtype", "shape", "mode", "size")]
        yield repr(form).encode()  # of an array or a PIL image
        yield value.tobytes()
    else:
        named = value if isinstance(value, dict) else _attributes(value, place)
        yield str(len(named)).encode()
        for name, item in named.items():
            yield from _parts(name, f"a key of {place}")
            yield from _parts(item, f"{place}[{name!r}]" if named is value else f"{place}.{name}")


def _has_objects(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.hasobject


def _attributes(value: Any, place: str) -> dict[str, Any]:
    declared = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    slots = [s for names in declared for s in ([names] if isinstance(names, str) else names)]
    slots = [slot for slot in slots if not slot.startswith("__")]
    has_any = hasattr(value, "__dict__") or slots
    if not has_any or callable(value):  # a function or a module is not what its attributes say
        raise ValueError(
            f"search: with an output, samples must be told apart, but {place} is a"
            f" {type(value).__qualname__}: give values, tensors, arrays and containers of them"
        )
    named = {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
    return named | getattr(value, "__dict__", {})
