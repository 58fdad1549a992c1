"""adapter_attention on every backend that runs here, against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vfmk
from tests import operator_checks
from tests.operator_checks import Call

NAME = "adapter_attention"
# Projections of r terms, two products of r and N terms, an exponential, and projections again.
FP32_LIMIT = 1e-5
# A softmax over few tokens leaves gradients that are differences of near equals.
LEAST_SHARE = 0.1
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def call(num_heads=1, **kwargs) -> Call:
    """Eager is the reference, F.linear and scaled_dot_product_attention, in the same dtype."""
    reference = vfmk.reference.adapter_attention
    return Call(
        vfmk.ops.adapter_attention, reference, reference, {"num_heads": num_heads, **kwargs}
    )


def arguments(
    tokens, rank, *, batch=2, dtype=torch.float32, device="cpu", layout="dense"
) -> tuple[Tensor, ...]:
    """Input [B, N, r], qkv_weight [3r, r], qkv_bias [3r]."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    if layout == "dense":
        input = random(batch, tokens, rank)
    elif layout == "strided":  # some columns of every other row: read in place
        input = random(batch, 2 * tokens, rank + 3)[:, ::2, 1 : rank + 1]
    else:  # "channels first": copied
        input = random(batch, rank, tokens).transpose(1, 2)
    return input, random(3 * rank, rank) * rank**-0.5, random(3 * rank) * 0.1


SHAPES = {  # tokens, rank, heads
    "adapter": (196, 32, 1),
    "several chunks of queries": (530, 32, 1),
    "four heads": (130, 32, 4),
    "two heads of 32": (100, 64, 2),
    "rank 8": (65, 8, 1),
    "heads of 2": (33, 8, 4),
    "odd heads": (47, 15, 5),
    "wide": (50, 136, 1),
    "two tokens": (2, 16, 2),
    "one token": (1, 32, 1),
    "rank 1": (49, 1, 1),
}
# Gradients that all but cancel hold, in half precision, the rounding of the saved output alone.
CANCELLING = ("heads of 2", "two tokens", "one token", "rank 1")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64(device, shape, dtype):
    if shape in CANCELLING and dtype != torch.float32:
        pytest.skip("nothing but rounding to measure")
    tokens, rank, heads = SHAPES[shape]
    args = arguments(tokens, rank, dtype=dtype, device=device)
    operator_checks.check_accuracy(call(heads), args, FP32_LIMIT, LEAST_SHARE)


@pytest.mark.parametrize("layout", ["strided", "channels first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(device, layout, dtype):
    args = arguments(50, 24, dtype=dtype, device=device, layout=layout)
    operator_checks.check_accuracy(call(2), args, FP32_LIMIT, LEAST_SHARE)
    dense = tuple(arg.contiguous() for arg in args)
    assert torch.equal(call(2)(*args), call(2)(*dense))
    assert call(2)(*args).is_contiguous()


@pytest.mark.parametrize("scale", [0.5, 0, -1])
def test_scale(device, scale):
    args = arguments(40, 16, device=device)
    operator_checks.check_accuracy(call(2, scale=scale), args, FP32_LIMIT, LEAST_SHARE)


def test_large_scores_stay_finite(device):
    input, weight, bias = arguments(100, 32, device=device)
    output, *gradients = operator_checks.value_and_gradients(call(), (100 * input, weight, bias))
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))
    # Scores of some thousands in fp32 leave three digits of those that all but tie.
    expected = vfmk.reference.adapter_attention(*(t.double() for t in (100 * input, weight, bias)))
    assert operator_checks.relative_error(output, expected) < 1e-3


def test_a_nan_is_not_lost(device):
    input, weight, bias = arguments(70, 16, device=device)
    input[1, 50, 3] = torch.nan
    output = vfmk.ops.adapter_attention(input, weight, bias)
    assert output[0].isfinite().all()
    assert output[1].isnan().all()


def test_same_bits_on_each_run(device):
    args = arguments(300, 32, device=device)
    operator_checks.check_deterministic(call(2), args)
    operator_checks.check_every_element_written(call(2), args)
    operator_checks.check_unwanted_gradients(call(2), args)


@pytest.mark.parametrize(("tokens", "batch"), [(1030, 1), (70, 20)])
def test_same_bits_for_any_number_of_threads(tokens, batch):
    with operator_checks.target(NAME, "cpu"):
        operator_checks.check_threads(call(2), arguments(tokens, 32, batch=batch))


@pytest.mark.parametrize(("batch", "tokens"), [(0, 7), (2, 0), (0, 0)])
def test_empty(device, batch, tokens):
    args = arguments(tokens, 16, batch=batch, device=device)
    output, *gradients = operator_checks.value_and_gradients(call(2), args)
    assert output.shape == args[0].shape
    for arg, gradient in zip(args, gradients, strict=True):
        assert gradient.shape == arg.shape
        assert not gradient.any()


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 150),
    heads=st.integers(1, 4),
    width=st.integers(1, 40),
    batch=st.integers(1, 3),
)
def test_any_shape(tokens, heads, width, batch):
    args = arguments(tokens, heads * width, batch=batch)
    operator_checks.check_accuracy(call(heads), args, FP32_LIMIT, LEAST_SHARE)


def test_any_cotangent(device):
    operator_checks.check_cotangents(call(2), arguments(6, 8, device=device))


def test_gradcheck():
    operator_checks.check_gradcheck(call(2), arguments(5, 4))


def test_opcheck(device):
    args = [operator_checks.preserving_leaf(t) for t in arguments(6, 8, device=device)]
    operator_checks.check_opcheck(torch.ops.vfmk.adapter_attention.default, (*args, 2, 0.5))


def test_compile(device):
    operator_checks.check_compile(call(2), arguments(6, 8, device=device), batched=1)


def test_export(device):
    operator_checks.check_export(call(2), arguments(6, 8, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device, dtype):
    operator_checks.check_autocast(call(2), arguments(6, 8, device=device), dtype)


INPUT, WEIGHT, BIAS = torch.zeros(2, 6, 8), torch.zeros(24, 8), torch.zeros(24)
GOOD = (INPUT, WEIGHT, BIAS)
BAD_INPUT = [  # arguments, keyword arguments, exception, message
    ((None, WEIGHT, BIAS), {}, TypeError, r"input must be a Tensor \[B, N, r\], got NoneType"),
    ((INPUT[0], WEIGHT, BIAS), {}, ValueError, r"input must have the shape \[B, N, r\], got \[6"),
    ((INPUT.int(), WEIGHT, BIAS), {}, TypeError, "input must be float32, .* got int32"),
    ((INPUT[..., :0], WEIGHT, BIAS), {}, ValueError, r"input has an r of 0, \[2, 6, 0\]"),
    ((INPUT, WEIGHT[:8], BIAS), {}, ValueError, r"qkv_weight must be \[24, 8\] .*, got \[8, 8\]"),
    ((INPUT, WEIGHT.half(), BIAS), {}, TypeError, "qkv_weight is float16, input is float32"),
    ((INPUT, WEIGHT, BIAS[:8]), {}, ValueError, r"qkv_bias must be \[24\] .*, got \[8\]"),
    ((INPUT, WEIGHT, None), {}, TypeError, "qkv_bias must be a Tensor"),
    ((INPUT, WEIGHT, BIAS.to("meta")), {}, ValueError, "qkv_bias is on meta, input is on cpu"),
    (GOOD, {"num_heads": 3}, ValueError, "num_heads must be a divisor of r = 8, got 3"),
    (GOOD, {"num_heads": 0}, ValueError, "num_heads must be a divisor of r = 8, got 0"),
    (GOOD, {"num_heads": 2.0}, TypeError, "num_heads must be an int, got 2.0"),
    (GOOD, {"scale": "1"}, TypeError, "scale must be a number, got '1'"),
]


@pytest.mark.parametrize(("args", "kwargs", "exception", "message"), BAD_INPUT)
def test_bad_input(args, kwargs, exception, message):
    with pytest.raises(exception, match=f"^{NAME}: {message}"):
        vfmk.ops.adapter_attention(*args, **kwargs)
