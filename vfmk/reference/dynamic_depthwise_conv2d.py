"""Per-sample depthwise convolution in plain PyTorch: shift, multiply, add."""

import torch
from torch import Tensor

from vfmk.reference.padding import output_size, pad, pair, resolve_padding, taps


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
    padded = pad(input, padding)
    grad_output = grad_output.to(padded.dtype)
    if grad_input is not None:
        grad_padded = torch.zeros_like(padded)
        for i, j, tap in taps(weight, dilation, grad_output.shape):
            grad_padded[tap] += weight[:, :, i, j, None, None] * grad_output
        top, _, left, _ = padding
        grad_input.copy_(grad_padded[:, :, top:, left:][:, :, : input.shape[2], : input.shape[3]])
    if grad_weight is not None:
        for i, j, tap in taps(weight, dilation, grad_output.shape):
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
    padded = pad(input, padding)
    size = output_size(padded, weight, dilation)
    output = padded.new_zeros(*padded.shape[:2], *size)
    for i, j, tap in taps(weight, dilation, output.shape):
        output = output + weight[:, :, i, j, None, None] * padded[tap]
    return output if bias is None else output + bias[:, :, None, None]
