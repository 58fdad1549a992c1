"""Per-sample dense convolution in plain PyTorch: shift, multiply matrices, add."""

import torch
from torch import Tensor

from vfmk.reference.padding import output_size, pad, pair, resolve_padding, taps


def dynamic_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int | tuple[int, int] | str = "same",
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """See `vfmk.ops.dynamic_conv2d`. Half-precision input is summed in fp32."""
    dilation = pair(dilation)
    sides = resolve_padding(padding, (weight.shape[3], weight.shape[4]), dilation)
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
            kernel = weight[..., i, j].to(padded.dtype)
            grad_padded[tap] += (kernel.mT @ grad_output.flatten(2)).view_as(grad_padded[tap])
        top, _, left, _ = padding
        grad_input.copy_(grad_padded[:, :, top:, left:][:, :, : input.shape[2], : input.shape[3]])
    if grad_weight is not None:
        for i, j, tap in taps(weight, dilation, grad_output.shape):
            products = grad_output.flatten(2) @ padded[tap].flatten(2).mT  # [B, O, C]
            grad_weight[..., i, j] = products.sum_to_size(grad_weight.shape[:3])
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
    output = padded.new_zeros(input.shape[0], weight.shape[1], *size)
    for i, j, tap in taps(weight, dilation, output.shape):
        kernel = weight[..., i, j].to(padded.dtype)  # [B or 1, O, C]
        output = output + (kernel @ padded[tap].flatten(2)).view_as(output)
    return output if bias is None else output + bias[:, :, None, None]
