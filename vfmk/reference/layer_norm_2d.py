"""Layer norm over the channels of an image, and a gather of them, in plain PyTorch."""

import torch
from torch import Tensor

from vfmk.reference.channel_index import positions
from vfmk.reference.sums import in_dtype_of_sums


def layer_norm_2d(
    input: Tensor, weight: Tensor, bias: Tensor, index: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """See `vfmk.ops.layer_norm_2d`. Half precision is computed in fp32, then rounded."""
    values, weight, bias = in_dtype_of_sums(input, weight, bias)
    mean, rstd = _moments(values, eps)
    output = weight[:, None, None] * ((values - mean) * rstd) + bias[:, None, None]
    return (output if index is None else output.index_select(1, index)).to(input.dtype)


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    index: Tensor | None,
    eps: float,
    channels_last: bool,
    output: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """Write `output` [B, C', rows, columns], `mean` and `rstd` [B, rows, columns]."""
    outside = None
    if index is not None:
        index, outside = positions("layer_norm_2d", index, input.shape[1])
    output.copy_(layer_norm_2d(input, weight, bias, index, eps=eps))
    if outside is not None:
        output.masked_fill_(outside[:, None, None], torch.nan)
    (values,) = in_dtype_of_sums(input)
    for moment, value in zip((mean, rstd), _moments(values, eps), strict=True):
        moment.copy_(value.squeeze(1))


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    index: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    channels_last: bool,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Write each gradient that is not None."""
    grad, values, weight = in_dtype_of_sums(grad_output, input, weight)
    rstd = rstd[:, None]
    normalized = (values - mean[:, None]) * rstd
    if index is not None:
        index, outside = positions("layer_norm_2d", index, input.shape[1])
        if outside is not None:
            grad = grad.masked_fill(outside[:, None, None], 0)
        grad = torch.zeros_like(values).index_add_(1, index, grad)
    if grad_input is not None:
        scaled = weight[:, None, None] * grad
        along = (scaled * normalized).mean(1, keepdim=True)
        grad_input.copy_(rstd * (scaled - scaled.mean(1, keepdim=True) - normalized * along))
    if grad_weight is not None:
        grad_weight.copy_((grad * normalized).sum((0, 2, 3)))
    if grad_bias is not None:
        grad_bias.copy_(grad.sum((0, 2, 3)))


def _moments(values: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps), [B, 1, H, W]."""
    mean = values.mean(1, keepdim=True)
    return mean, ((values - mean).square().mean(1, keepdim=True) + eps).rsqrt()
