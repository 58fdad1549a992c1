"""Geometry that the convolution operators share: padding, and what each tap multiplies."""

from collections.abc import Iterator
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmk.reference.sums import dtype_of_sums


def resolve_padding(
    padding: int | tuple[int, int] | str, kernel_size: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Zeros added at (top, bottom, left, right).

    "same" keeps the size; an even kernel then gets its odd zero at the bottom and right, as in
    `torch.nn.functional.conv2d`.
    """
    if isinstance(padding, str):  # "same"
        total_h, total_w = (d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True))
        return total_h // 2, total_h - total_h // 2, total_w // 2, total_w - total_w // 2
    pad_h, pad_w = pair(padding)
    return pad_h, pad_h, pad_w, pad_w


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(vertical, horizontal) of an argument that takes one int for both."""
    return (value, value) if isinstance(value, int) else value


def pad(input: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """`input` with its zeros, in the dtype of the sums."""
    top, bottom, left, right = padding
    return F.pad(input.to(dtype_of_sums(input)), (left, right, top, bottom))


def output_size(padded: Tensor, weight: Tensor, dilation: tuple[int, int]) -> tuple[int, int]:
    height = padded.shape[2] - dilation[0] * (weight.shape[-2] - 1)
    width = padded.shape[3] - dilation[1] * (weight.shape[-1] - 1)
    return height, width


def taps(
    weight: Tensor, dilation: tuple[int, int], output_shape: torch.Size
) -> Iterator[tuple[int, int, tuple[EllipsisType, slice, slice]]]:
    """Each kernel position (i, j) and the slice of the padded input that it multiplies."""
    height, width = output_shape[2:]
    for i in range(weight.shape[-2]):
        for j in range(weight.shape[-1]):
            top, left = i * dilation[0], j * dilation[1]
            yield i, j, (..., slice(top, top + height), slice(left, left + width))
