"""Tokens pooled by their softmax similarity to a few queries."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vfmk import _backends
from vfmk.ops import _contract, _implementations, _operator
from vfmk.reference.sums import dtype_of_sums

NAME = "attention_pool"


def attention_pool(tokens: Tensor, queries: Tensor, *, scale: float = 1.0) -> Tensor:
    """For every query, the mean of the tokens weighted by their softmax similarity to it.

    Differentiable, once, in both tensors; the similarities are never stored. Sums are fp32 (fp64
    for float64), and the bits are the same on each run. Works under autocast, torch.compile and
    torch.export. float64 and, on CUDA, an M or a D above 64 run in plain PyTorch, whose
    similarities take O(N·M) memory.

    Args:
        tokens: [B, N, D], float32, float16, bfloat16 or float64. Read in place whatever the
            strides, if D is dense; else copied first. B or N may be 0.
        queries: [M, D] of tokens' dtype, the same for the whole batch. Up to 64 are fast.
        scale: factor of the dot products.

    Returns:
        [B, M, D] in tokens' dtype, contiguous: softmax over the N tokens of scale·⟨token, query⟩,
        times the tokens. Zeros where there are no tokens, as the sum over none.

    Raises:
        TypeError, ValueError: naming the argument.

    Equivalent to::

        output = (scale * queries @ tokens.transpose(1, 2)).softmax(2) @ tokens

    Source: VFM-Adapter (AAAI 2025), the query tokens of the parameter generator.
    """
    _contract.check_tensor(NAME, "tokens", tokens, "B, N, D")
    _contract.check_tensor(NAME, "queries", queries, "M, D")
    _contract.check_alike(NAME, tokens, first="tokens", queries=queries)
    if queries.shape[1] != tokens.shape[2]:
        raise ValueError(
            f"{NAME}: queries are {queries.shape[1]} wide, tokens are {tokens.shape[2]}"
        )
    scale = _contract.as_float(NAME, "scale", scale)
    tokens, queries = _contract.autocast(tokens, queries)  # type: ignore[assignment]
    return _forward(tokens, queries, scale)[0]


@_operator.define(NAME)
@_backends.without_autocast
def _forward(tokens: Tensor, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    output, log_sum_exp = _empty_output(tokens, queries, scale)
    kernel = _backends.kernel(NAME, "forward", tokens, queries)
    if tokens.numel() > 0 and queries.numel() > 0:
        readable = _contract.dense_last(tokens)
        kernel(readable, queries.contiguous(), scale, output, log_sum_exp)
    else:
        output.zero_()
        log_sum_exp.fill_(-torch.inf)
    return output, log_sum_exp


@_forward.register_fake
def _empty_output(tokens: Tensor, queries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output, and for backward the logarithm of each query's sum: [B, M]."""
    shape = (tokens.shape[0], queries.shape[0])
    output = tokens.new_empty((*shape, tokens.shape[2]))
    return output, tokens.new_empty(shape, dtype=dtype_of_sums(tokens))


@_operator.define(f"{NAME}_backward")
@_backends.without_autocast
def _backward(
    grad_output: Tensor,
    tokens: Tensor,
    queries: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    gradients = _empty_gradients(grad_output, tokens, queries, output, log_sum_exp, scale, wanted)
    kernel = _backends.kernel(NAME, "backward", tokens, queries)
    if tokens.numel() > 0 and queries.numel() > 0:
        kernel(
            grad_output.contiguous(), _contract.dense_last(tokens), queries.contiguous(),
            output, log_sum_exp, scale,
            *_contract.if_wanted(gradients, wanted),
        )  # fmt: skip
    else:
        for gradient in gradients:
            gradient.zero_()
    return gradients


@_backward.register_fake
def _empty_gradients(
    grad_output: Tensor,
    tokens: Tensor,
    queries: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    grad_tokens, grad_queries = _contract.empty_gradients((tokens, queries), wanted)
    return grad_tokens, grad_queries


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    tokens, queries, ctx.scale = inputs
    ctx.save_for_backward(tokens, queries, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad_output: Tensor, _: Tensor | None):  # type: ignore[no-untyped-def]
    wanted = list(ctx.needs_input_grad[:2])
    gradients = _backward(grad_output, *ctx.saved_tensors, ctx.scale, wanted)
    return *_contract.if_wanted(gradients, wanted), None


_forward.register_autograd(_gradients, setup_context=_setup_context)


_implementations.register(NAME)
