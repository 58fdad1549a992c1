"""Attention pooling in Triton under the interpreter, against the float64 reference."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

import vfmk
from tests import operator_checks
from tests.kernels.interpreter import interpreted
from tests.operator_checks import relative_error
from tests.ops import test_attention_pool as ops
from vfmk import reference

# Of ‖result‖. In fp16 the weights, the gradients of the scores and each result are rounded once, at
# 5e-4. (The interpreter cannot multiply bf16.)
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3}
# tokens, queries, token width, batch
SHAPES = {
    "one token, one query": (1, 1, 16, 1),
    "few tokens": (7, 5, 48, 3),
    "ragged": (100, 16, 64, 1),
    "ragged, one query": (100, 1, 64, 3),
    "ragged, width of no power of two": (196, 5, 48, 3),
    "many queries": (196, 64, 64, 1),
    "whole tiles": (256, 16, 16, 1),
}


def arguments(tokens: int, queries: int, width: int, batch: int, dtype: torch.dtype):
    """grad_output, tokens and queries; the tokens share a mean."""
    generator = torch.Generator().manual_seed(tokens * width + queries)

    def normal(*shape: int, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)

    return (
        normal(batch, queries, width),
        normal(batch, tokens, width, mean=0.5),
        normal(queries, width),
    )


def nan_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full(tensor.shape, float("nan"), dtype=tensor.dtype)


def run(grad_output, tokens, queries, scale, wanted=(True, True)):
    """output, log_sum_exp and the gradients from the kernels, None for those not wanted."""
    from vfmk.kernels import attention_pool as kernels

    assert kernels.not_supported(tokens, queries) == ""
    output = nan_like(grad_output)
    log_sum_exp = torch.full(grad_output.shape[:2], float("nan"))
    kernels.forward(tokens, queries, scale, output, log_sum_exp)
    gradients = [
        nan_like(tensor) if want else None
        for tensor, want in zip((tokens, queries), wanted, strict=True)
    ]
    kernels.backward(grad_output, tokens, queries, output, log_sum_exp, scale, *gradients)
    return output, log_sum_exp, *gradients


def truth(grad_output, tokens, queries, scale):
    leaves = [tensor.double().requires_grad_() for tensor in (tokens, queries)]
    output = reference.attention_pool(*leaves, scale=scale)
    gradients = torch.autograd.grad(output, leaves, grad_output.double())
    scores = scale * leaves[1].detach() @ leaves[0].detach().mT
    return output.detach(), torch.logsumexp(scores, 2), *gradients


def check(actual, expected, limit: float) -> None:
    names = ("output", "log_sum_exp", "grad_tokens", "grad_queries")
    least = 0.2 * float(expected[2].norm())  # one token has no gradient through its weight
    for name, value, true in zip(names, actual, expected, strict=True):
        assert relative_error(value, true, least) <= limit, name


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES)
@interpreted
def test_forward_and_gradients(shape, dtype):
    args = (*arguments(*SHAPES[shape], dtype), 0.3)
    check(run(*args), truth(*args), LIMITS[dtype])


@pytest.mark.parametrize("most_parts", [1, 2, 3])
@interpreted
def test_parts(most_parts):
    """196 tokens in one part, in two of four tiles, and in three of which the last is shorter."""
    from vfmk.kernels import attention_pool as kernels

    args = (*arguments(196, 5, 48, 3, torch.float32), 0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_MOST_PARTS", most_parts)
        assert kernels._cut(*args[1:3]).parts == most_parts
        check(run(*args), truth(*args), LIMITS[torch.float32])


@interpreted
def test_strided_tokens():
    grad_output, tokens, queries = arguments(7, 5, 16, 3, torch.float32)
    apart = torch.full((7, 3, 20), float("nan"))
    apart[:, :, :16] = tokens.transpose(0, 1)
    strided = apart[:, :, :16].transpose(0, 1)
    dense = run(grad_output, tokens, queries, 0.3)
    assert all(map(torch.equal, run(grad_output, strided, queries, 0.3), dense))


@interpreted
def test_wanted_gradients_and_same_bits():
    args = (*arguments(100, 5, 16, 3, torch.float32), 0.3)
    every = run(*args)
    for wanted in itertools.product((False, True), repeat=2):
        some = run(*args, wanted)
        for value, whole, want in zip(some, every, (True, True, *wanted), strict=True):
            assert torch.equal(value, whole) if want else value is None


@pytest.mark.parametrize("all_negative", [False, True])
@interpreted
def test_great_scores(all_negative):
    """Scores in the thousands: no exponential may overflow, those of a tile's padding included."""
    grad_output, tokens, queries = arguments(100, 5, 16, 1, torch.float32)
    if all_negative:
        tokens, queries = tokens.abs(), -queries.abs()
    args = (grad_output, tokens, queries, 300.0)
    output, log_sum_exp, *gradients = run(*args)
    true_output, true_log_sum_exp, *_ = truth(*args)
    assert relative_error(output, true_output) <= 1e-3
    assert relative_error(log_sum_exp, true_log_sum_exp) <= 1e-6
    assert all(gradient.isfinite().all() for gradient in gradients)


@interpreted
def test_any_cotangent():
    with vfmk.use_backend("triton"):
        operator_checks.check_cotangents(ops.call(), ops.arguments(20, 16, 3))


@interpreted
def test_not_supported():
    from vfmk.kernels import attention_pool as kernels

    tokens, queries = torch.empty(1, 4, 16), torch.empty(5, 16)
    assert "float64" in kernels.not_supported(tokens.double(), queries.double())
    assert "200 queries" in kernels.not_supported(tokens, torch.empty(200, 16))
    assert "width 256" in kernels.not_supported(torch.empty(1, 4, 256), torch.empty(5, 256))
    distant = torch.empty(1, 2**28, 16, device="meta")
    assert "tokens" in kernels.not_supported(distant, queries)
