"""Attention pooling in plain PyTorch."""

import torch
from torch import Tensor


def attention_pool(tokens: Tensor, queries: Tensor, *, scale: float = 1.0) -> Tensor:
    """See `vfmk.ops.attention_pool`."""
    return (scale * queries @ tokens.transpose(1, 2)).softmax(2) @ tokens


def forward(
    tokens: Tensor, queries: Tensor, scale: float, output: Tensor, log_sum_exp: Tensor
) -> None:
    """Write `output` [B, M, D] and `log_sum_exp` [B, M], of the scaled scores."""
    tokens, queries = _in_sums_dtype(tokens, queries)
    scores = scale * queries @ tokens.transpose(1, 2)  # [B, M, N]
    output.copy_(scores.softmax(2) @ tokens)
    log_sum_exp.copy_(scores.logsumexp(2))


def backward(
    grad_output: Tensor,
    tokens: Tensor,
    queries: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    grad_tokens: Tensor | None,
    grad_queries: Tensor | None,
) -> None:
    """Write each gradient that is not None."""
    grad_output, tokens, queries = _in_sums_dtype(grad_output, tokens, queries)
    weights = (scale * queries @ tokens.transpose(1, 2)).softmax(2)
    grad_weights = grad_output @ tokens.transpose(1, 2)
    mean = (grad_weights * weights).sum(2, keepdim=True)
    grad_scores = scale * weights * (grad_weights - mean)
    if grad_tokens is not None:
        through_scores = grad_scores.transpose(1, 2) @ queries
        grad_tokens.copy_(through_scores + weights.transpose(1, 2) @ grad_output)
    if grad_queries is not None:
        grad_queries.copy_((grad_scores @ tokens).sum(0))


def _in_sums_dtype(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return [tensor.to(dtype) for tensor in tensors]
