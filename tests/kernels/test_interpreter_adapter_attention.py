"""The adapter's attention in Triton under the interpreter, against the float64 reference."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

import vfmk
from tests import operator_checks
from tests.kernels.interpreter import interpreted
from tests.operator_checks import relative_error
from tests.ops import test_adapter_attention as ops
from vfmk import reference

# Of ‖result‖. In fp16 the weights, the gradients of the scores and each result are rounded once, at
# 5e-4. (The interpreter cannot multiply bf16.)
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3}
# tokens, rank, heads, batch
SHAPES = {
    "one token": (1, 32, 1, 1),
    "few tokens, low rank": (7, 8, 2, 3),
    "ragged": (100, 32, 1, 1),
    "ragged, heads of 8": (100, 16, 2, 3),
    "rank of no power of two": (196, 24, 1, 1),
    "rank of no power of two, heads of 6": (100, 24, 4, 1),
    "high rank": (196, 64, 4, 1),
    "whole tiles": (256, 32, 1, 1),
}


def arguments(tokens: int, rank: int, heads: int, batch: int, dtype: torch.dtype):
    """grad_output, input, qkv_weight and qkv_bias; the tokens share a mean, as after an activation
    with a positive one."""
    generator = torch.Generator().manual_seed(tokens * rank + heads)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (values * scale + mean).to(dtype)

    return (
        normal(batch, tokens, rank),
        normal(batch, tokens, rank, mean=0.5),
        normal(3 * rank, rank, scale=1.5 * rank**-0.5),
        normal(3 * rank, scale=0.5),
    )


def nan_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full(tensor.shape, float("nan"), dtype=tensor.dtype)


def run(grad_output, input, qkv_weight, qkv_bias, heads, scale, wanted=(True, True, True)):
    """output, log_sum_exp and the gradients from the kernels, None for those not wanted."""
    from vfmk.kernels import adapter_attention as kernels

    assert kernels.not_supported(input, heads) == ""
    batch, tokens, _ = input.shape
    output = nan_like(input)
    log_sum_exp = torch.full((batch, heads, tokens), float("nan"))
    kernels.forward(input, qkv_weight, qkv_bias, heads, scale, output, log_sum_exp)
    gradients = [
        nan_like(tensor) if want else None
        for tensor, want in zip((input, qkv_weight, qkv_bias), wanted, strict=True)
    ]
    kernels.backward(
        *(grad_output, input, qkv_weight, qkv_bias, output, log_sum_exp, heads, scale), *gradients
    )
    return output, log_sum_exp, *gradients


def truth(grad_output, input, qkv_weight, qkv_bias, heads, scale):
    leaves = [t.double().requires_grad_() for t in (input, qkv_weight, qkv_bias)]
    output = reference.adapter_attention(*leaves, heads, scale=scale)
    gradients = torch.autograd.grad(output, leaves, grad_output.double())
    query, key, _ = torch.nn.functional.linear(*(t.detach() for t in leaves)).chunk(3, dim=2)
    query, key = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (query, key))
    return output.detach(), torch.logsumexp(scale * query @ key.mT, 3), *gradients


def check(actual, expected, limit: float) -> None:
    names = ("output", "log_sum_exp", "grad_input", "grad_weight", "grad_bias")
    least = 0.05 * float(expected[2].norm())  # one token has no gradient through its weight
    for name, value, true in zip(names, actual, expected, strict=True):
        assert relative_error(value, true, least) <= limit, name


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES)
@interpreted
def test_forward_and_gradients(shape, dtype):
    heads = SHAPES[shape][2]
    args = (*arguments(*SHAPES[shape], dtype), heads, 0.3)
    check(run(*args), truth(*args), LIMITS[dtype])


@interpreted
def test_strided_input():
    grad_output, input, *parameters = arguments(7, 16, 2, 3, torch.float32)
    args = (grad_output, input, *parameters, 2, 0.3)
    apart = torch.full((7, 3, 20), float("nan"))
    apart[:, :, :16] = input.transpose(0, 1)
    strided = (grad_output, apart[:, :, :16].transpose(0, 1), *parameters, 2, 0.3)
    assert all(map(torch.equal, run(*args), run(*strided)))


@interpreted
def test_wanted_gradients_and_same_bits():
    args = (*arguments(100, 16, 2, 1, torch.float32), 2, 0.3)
    every = run(*args)
    for wanted in itertools.product((False, True), repeat=3):
        some = run(*args, wanted)
        for value, whole, want in zip(some, every, (True, True, *wanted), strict=True):
            assert torch.equal(value, whole) if want else value is None


@interpreted
def test_great_scores():
    """Scores in the thousands: the running maximum keeps every exponential finite."""
    args = (*arguments(100, 16, 1, 1, torch.float32), 1, 300.0)
    output, log_sum_exp, *gradients = run(*args)
    true_output, true_log_sum_exp, *_ = truth(*args)
    assert relative_error(output, true_output) <= 1e-3
    assert relative_error(log_sum_exp, true_log_sum_exp) <= 1e-6
    assert all(gradient.isfinite().all() for gradient in gradients)


@interpreted
def test_any_cotangent():
    with vfmk.use_backend("triton"):
        operator_checks.check_cotangents(ops.call(2), ops.arguments(20, 16))


@interpreted
def test_not_supported():
    from vfmk.kernels import adapter_attention as kernels

    assert "rank 160" in kernels.not_supported(torch.empty(1, 4, 160), 1)
    assert "float64" in kernels.not_supported(torch.empty(1, 4, 16, dtype=torch.float64), 1)
    assert "tokens" in kernels.not_supported(torch.empty(1, 2**26, 32, device="meta"), 1)
