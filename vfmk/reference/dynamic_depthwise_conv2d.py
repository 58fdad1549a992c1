"""Per-sample depthwise convolution in plain PyTorch: shift, multiply, add."""

from collections.abc import Iterator
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmk.reference.padding import pair, resolve_padding


def dynamic_depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int | tuple[int, int] | str = "same",
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """See `vfmk.ops.dynamic_depthwise_conv2d`. Half-precision input is summed in fp32."""
    dilation = pair(dilation)
    sides = resolve_padding(padding, (weight.shape[2], weight.shape[3]), dilation)
    return _convolve(input, weight, bias, sides, dilation).to(input.dtype)


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    output: Tensor,
) -> None:
    """Write `output`; padding is (top, bottom, left, right)."""
    output.copy_(_convolve(input, weight, bias, padding, dilation))


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Write each gradient that is not None."""
    padded = _pad(input, padding)
    grad_output = grad_output.to(padded.dtype)
    if grad_input is not None:
        grad_padded = torch.zeros_like(padded)
        for i, j, tap in _taps(weight, dilation, grad_output.shape):
            grad_padded[tap] += weight[:, :, i, j, None, None] * grad_output
        top, _, left, _ = padding
        grad_input.copy_(grad_padded[:, :, top:, left:][:, :, : input.shape[2], : input.shape[3]])
    if grad_weight is not None:
        for i, j, tap in _taps(weight, dilation, grad_output.shape):
            products = (padded[tap] * grad_output).sum((2, 3))
            grad_weight[:, :, i, j] = products.sum_to_size(grad_weight.shape[:2])
    if grad_bias is not None:
        grad_bias.copy_(grad_output.sum((2, 3)).sum_to_size(grad_bias.shape))


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> Tensor:
    padded = _pad(input, padding)
    batch, channels, padded_height, padded_width = padded.shape
    height = padded_height - dilation[0] * (weight.shape[2] - 1)
    width = padded_width - dilation[1] * (weight.shape[3] - 1)
    output = padded.new_zeros(batch, channels, height, width)
    for i, j, tap in _taps(weight, dilation, output.shape):
        output = output + weight[:, :, i, j, None, None] * padded[tap]
    return output if bias is None else output + bias[:, :, None, None]


def _pad(input: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """`input` with its zeros, in the dtype of the sums."""
    top, bottom, left, right = padding
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return F.pad(input.to(dtype), (left, right, top, bottom))


def _taps(
    weight: Tensor, dilation: tuple[int, int], output_shape: torch.Size
) -> Iterator[tuple[int, int, tuple[EllipsisType, slice, slice]]]:
    """Each kernel position (i, j) and the slice of the padded input that it multiplies."""
    height, width = output_shape[2:]
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            top, left = i * dilation[0], j * dilation[1]
            yield i, j, (..., slice(top, top + height), slice(left, left + width))
