"""Attention pooling in plain PyTorch."""

from torch import Tensor

from vfmk.reference.sums import in_dtype_of_sums


def attention_pool(tokens: Tensor, queries: Tensor, *, scale: float = 1.0) -> Tensor:
    """See `vfmk.ops.attention_pool`."""
    return (scale * queries @ tokens.transpose(1, 2)).softmax(2) @ tokens


def forward(
    tokens: Tensor, queries: Tensor, scale: float, output: Tensor, log_sum_exp: Tensor
) -> None:
    """Write `output` [B, M, D] and `log_sum_exp` [B, M], of the scaled scores."""
    tokens, queries = in_dtype_of_sums(tokens, queries)
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
    grad_output, tokens, queries = in_dtype_of_sums(grad_output, tokens, queries)
    weights = (scale * queries @ tokens.transpose(1, 2)).softmax(2)
    grad_weights = grad_output @ tokens.transpose(1, 2)
    mean = (grad_weights * weights).sum(2, keepdim=True)
    grad_scores = scale * weights * (grad_weights - mean)
    if grad_tokens is not None:
        through_scores = grad_scores.transpose(1, 2) @ queries
        grad_tokens.copy_(through_scores + weights.transpose(1, 2) @ grad_output)
    if grad_queries is not None:
        grad_queries.copy_((grad_scores @ tokens).sum(0))
