"""Self-attention in an adapter's bottleneck, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmk.reference.sums import in_dtype_of_sums


def adapter_attention(
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    num_heads: int = 1,
    *,
    scale: float | None = None,
) -> Tensor:
    """See `vfmk.ops.adapter_attention`."""
    query, key, value = _project(input, qkv_weight, qkv_bias, num_heads)
    return _merge(F.scaled_dot_product_attention(query, key, value, scale=scale))


def forward(
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    num_heads: int,
    scale: float,
    output: Tensor,
    log_sum_exp: Tensor,
) -> None:
    """Write `output` [B, N, r] and `log_sum_exp` [B, heads, N], of the scaled scores."""
    input, qkv_weight, qkv_bias = in_dtype_of_sums(input, qkv_weight, qkv_bias)
    query, key, value = _project(input, qkv_weight, qkv_bias, num_heads)
    scores = scale * query @ key.transpose(2, 3)
    output.copy_(_merge(scores.softmax(-1) @ value))
    log_sum_exp.copy_(scores.logsumexp(-1))


def backward(
    grad_output: Tensor,
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    num_heads: int,
    scale: float,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Write each gradient that is not None."""
    grad_output, input, qkv_weight, qkv_bias = in_dtype_of_sums(
        grad_output, input, qkv_weight, qkv_bias
    )
    query, key, value = _project(input, qkv_weight, qkv_bias, num_heads)
    grad = grad_output.unflatten(2, (num_heads, -1)).transpose(1, 2)  # [B, heads, N, r / heads]
    weights = (scale * query @ key.transpose(2, 3)).softmax(-1)
    grad_weights = grad @ value.transpose(2, 3)
    mean = (grad_weights * weights).sum(-1, keepdim=True)
    grad_scores = scale * weights * (grad_weights - mean)
    projections = (
        grad_scores @ key,
        grad_scores.transpose(2, 3) @ query,
        weights.transpose(2, 3) @ grad,
    )
    grad_qkv = torch.cat([_merge(gradient) for gradient in projections], dim=2)  # [B, N, 3r]
    if grad_input is not None:
        grad_input.copy_(grad_qkv @ qkv_weight)
    if grad_weight is not None:
        grad_weight.copy_(grad_qkv.flatten(0, 1).T @ input.flatten(0, 1))
    if grad_bias is not None:
        grad_bias.copy_(grad_qkv.sum((0, 1)))


def _project(
    input: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, num_heads: int
) -> tuple[Tensor, ...]:
    """Queries, keys and values, each [B, heads, N, r / heads]."""
    qkv = F.linear(input, qkv_weight, qkv_bias).unflatten(2, (3, num_heads, -1))
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def _merge(heads: Tensor) -> Tensor:
    """[B, heads, N, d] → [B, N, heads·d]."""
    return heads.transpose(1, 2).flatten(2)
