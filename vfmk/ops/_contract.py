"""What every operator's public function does before its custom op: check, then autocast."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(operator: str, argument: str, value: Any, shape: str) -> None:
    """`value` is a floating-point tensor with the dimensions of `shape`, as "B, C, H, W".

    "..." stands for any number of dimensions.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{operator}: {argument} must be a Tensor [{shape}], got {type(value).__name__}"
        )
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{operator}: {argument} must be float32, float16, bfloat16 or float64,"
            f" got {_name(value.dtype)}"
        )
    if "..." not in shape and value.dim() != shape.count(",") + 1:
        raise ValueError(
            f"{operator}: {argument} must have the shape [{shape}], got {list(value.shape)}"
        )


def check_alike(
    operator: str, input: Tensor, *, first: str = "input", **others: Tensor | None
) -> None:
    """Every tensor in `others` has the dtype and the device of `input`, the argument `first`."""
    for argument, other in others.items():
        if other is None:
            continue
        if other.dtype != input.dtype and not (_autocasts(input) and _autocasts(other)):
            raise TypeError(
                f"{operator}: {argument} is {_name(other.dtype)}, {first} is {_name(input.dtype)}"
            )
        if other.device != input.device:
            raise ValueError(
                f"{operator}: {argument} is on {other.device}, {first} is on {input.device}"
            )


def check_index(operator: str, input: Tensor, index: Any, shape: str, *dimensions: int) -> None:
    """`index` is an int64 tensor of one of the `dimensions` of `shape`, as "[C'] or [B, C']"."""
    if not isinstance(index, Tensor):
        raise TypeError(f"{operator}: index must be a Tensor {shape}, got {type(index).__name__}")
    if index.dtype != torch.int64:
        raise TypeError(f"{operator}: index must be int64, got {_name(index.dtype)}")
    if index.dim() not in dimensions:
        raise ValueError(f"{operator}: index must have the shape {shape}, got {list(index.shape)}")
    if index.device != input.device:
        raise ValueError(f"{operator}: index is on {index.device}, input is on {input.device}")


def autocast(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """The tensors in autocast's dtype where autocast is on, as it treats `conv2d` and `linear`; or
    in `dtype`, as it treats what loses too much in half precision."""
    first = tensors[0]
    assert first is not None
    if not _autocasts(first):
        return list(tensors)
    dtype = dtype or torch.get_autocast_dtype(first.device.type)
    return [
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in tensors
    ]


def dense_last(tensor: Tensor) -> Tensor:
    """What kernels read in place: any view with a dense last dimension; of others, a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def empty_gradients(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """A dense tensor for each gradient, empty ([0]) for those that nobody wants."""
    return [
        tensor.new_empty(tensor.shape if want else 0)
        for tensor, want in zip(tensors, wanted, strict=True)
    ]


def if_wanted(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Each gradient, None where nobody wants it."""
    return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]


def check_int(operator: str, argument: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{operator}: {argument} must be an int, got {value!r}")


def as_float(operator: str, argument: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{operator}: {argument} must be a number, got {value!r}")
    return float(value)


def int_pair(operator: str, argument: str, value: Any, minimum: int) -> tuple[int, int]:
    """`value` as (vertical, horizontal); it may be one int or a pair of them."""
    pair = (value, value) if isinstance(value, int) else value
    is_pair = isinstance(pair, tuple | list) and len(pair) == 2
    if not is_pair or not all(isinstance(v, int) and not isinstance(v, bool) for v in pair):
        raise TypeError(f"{operator}: {argument} must be an int or a pair of ints, got {value!r}")
    if min(pair) < minimum:
        raise ValueError(f"{operator}: {argument} must be at least {minimum}, got {value!r}")
    return pair[0], pair[1]


def _autocasts(tensor: Tensor) -> bool:
    device = tensor.device.type
    # Not torch.amp.is_autocast_available: torch.compile of 2.10 stops at it.
    enabled = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return enabled and tensor.dtype != torch.float64


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
