"""Channels read in another order and scaled, in plain PyTorch: gather, multiply."""

import torch
from torch import Tensor

from vfmk.reference.channel_index import positions
from vfmk.reference.sums import dtype_of_sums


def channel_remap(
    input: Tensor, index: Tensor, scale: Tensor | None = None, *, dim: int = 1
) -> Tensor:
    """See `vfmk.ops.channel_remap`. Half-precision products are fp32, then rounded."""
    dim %= input.dim()
    shape = [1] * input.dim()
    shape[dim] = index.shape[-1]
    if index.dim() == 2:
        shape[0] = index.shape[0]
    size = [*input.shape[:dim], index.shape[-1], *input.shape[dim + 1 :]]
    output = input.gather(dim, index.view(shape).expand(size))
    if scale is not None:
        output = output.to(dtype_of_sums(input)) * scale.view(shape)
    return output.to(input.dtype)


def forward(
    input: Tensor, index: Tensor, scale: Tensor | None, channels_last: bool, output: Tensor
) -> None:
    """Write `output`: [N, C', H, W] from [N, C, H, W]; index is [maps, C'], and maps divides N."""
    index, outside = positions("channel_remap", index, input.shape[1])
    if output.numel() and input.numel():
        output.copy_(channel_remap(input, *_of_each_sample(output, index, scale)))
    if outside is not None:
        nowhere, _ = _of_each_sample(output, outside, None)
        output.masked_fill_(nowhere[:, :, None, None], torch.nan)


def backward(
    grad_output: Tensor,
    input: Tensor | None,
    index: Tensor,
    scale: Tensor | None,
    input_channels: int,
    channels_last: bool,
    grad_input: Tensor | None,
    grad_scale: Tensor | None,
) -> None:
    """Write each gradient that is not None."""
    gradient = grad_output.to(dtype_of_sums(grad_output))
    index, outside = positions("channel_remap", index, input_channels)
    indices, scales = _of_each_sample(grad_output, index, scale)
    sources = indices[:, :, None, None].expand(grad_output.shape)
    if grad_input is not None and grad_input.numel():
        scaled = gradient if scales is None else gradient * scales[:, :, None, None]
        if outside is not None:
            nowhere, _ = _of_each_sample(grad_output, outside, None)
            scaled = scaled.masked_fill(nowhere[:, :, None, None], 0)
        total = gradient.new_zeros(grad_input.shape)
        grad_input.copy_(total.scatter_add_(1, sources, scaled))
    if grad_scale is not None:
        assert input is not None
        # Of no channels all that is read lies outside, and becomes NaN below.
        own = input.gather(1, sources) if input.numel() else gradient
        products = (own * gradient).sum((2, 3))
        samples = grad_output.shape[0] // max(1, index.shape[0])
        grad_scale.copy_(products.view(index.shape[0], samples, index.shape[1]).sum(1))
        if outside is not None:
            grad_scale.masked_fill_(outside, torch.nan)


def _of_each_sample(
    output: Tensor, index: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    samples = output.shape[0] // max(1, index.shape[0])
    if scale is not None:
        scale = scale.repeat_interleave(samples, 0)
    return index.repeat_interleave(samples, 0), scale
