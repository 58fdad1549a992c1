"""Strides as launches take them."""

from torch import Tensor


def strides_of(*tensors: Tensor, dimensions: int | None = None) -> tuple[int, ...]:
    """Of each tensor's first dimensions, or all; 0 where a stride has no use, with one element."""
    return tuple(
        stride if size > 1 else 0
        for tensor in tensors
        for size, stride in list(zip(tensor.shape, tensor.stride(), strict=True))[:dimensions]
    )
