"""attention_pool on every backend that runs here, against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vfmk
from tests import operator_checks
from tests.operator_checks import Call

NAME = "attention_pool"
# Two products of D and N terms and an exponential; of one token, the queries' gradient is zero, and
# what is left of its terms is measured by a tenth of the tokens' gradient.
FP32_LIMIT = 2e-5
# A softmax over few tokens leaves gradients that are differences of near equals.
LEAST_SHARE = 0.1
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def call(**kwargs) -> Call:
    """Eager is the reference, two products and a softmax, in the same dtype."""
    reference = vfmk.reference.attention_pool
    return Call(vfmk.ops.attention_pool, reference, reference, kwargs)


def arguments(
    tokens, width, queries, *, batch=2, dtype=torch.float32, device="cpu", layout="dense"
) -> tuple[Tensor, ...]:
    """Tokens [B, N, D] and queries [M, D]."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    if layout == "dense":
        keys = random(batch, tokens, width)
    elif layout == "strided":  # some columns of every other row: read in place
        keys = random(batch, 2 * tokens, width + 3)[:, ::2, 1 : width + 1]
    else:  # "channels first": copied
        keys = random(batch, width, tokens).transpose(1, 2)
    return keys, random(queries, width) * width**-0.5


SHAPES = {  # tokens, width, queries
    "adapter": (196, 64, 16),
    "several chunks of tokens": (1100, 32, 16),
    "64 queries": (100, 64, 64),
    "many queries": (60, 24, 130),
    "one query": (77, 64, 1),
    "ragged": (49, 20, 5),
    "wide": (50, 200, 7),
    "one token": (1, 16, 3),
    "two tokens": (2, 48, 3),
    "width 1": (33, 1, 2),
}
# Gradients that all but cancel hold, in half precision, the rounding of the saved output alone.
CANCELLING = ("one token", "two tokens", "width 1")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64(device, shape, dtype):
    if shape in CANCELLING and dtype != torch.float32:
        pytest.skip("nothing but rounding to measure")
    args = arguments(*SHAPES[shape], dtype=dtype, device=device)
    operator_checks.check_accuracy(call(), args, FP32_LIMIT, LEAST_SHARE)


@pytest.mark.parametrize("layout", ["strided", "channels first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(device, layout, dtype):
    args = arguments(60, 32, 16, dtype=dtype, device=device, layout=layout)
    operator_checks.check_accuracy(call(), args, FP32_LIMIT, LEAST_SHARE)
    dense = tuple(arg.contiguous() for arg in args)
    assert torch.equal(call()(*args), call()(*dense))
    assert call()(*args).is_contiguous()


@pytest.mark.parametrize("scale", [0.125, 0, -1])
def test_scale(device, scale):
    args = arguments(40, 16, 4, device=device)
    operator_checks.check_accuracy(call(scale=scale), args, FP32_LIMIT, LEAST_SHARE)


def test_large_scores_stay_finite(device):
    tokens, queries = arguments(1100, 32, 5, device=device)
    args = (100 * tokens, queries)
    output, *gradients = operator_checks.value_and_gradients(call(), args)
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))
    # Scores of some thousands in fp32 leave three digits of those that all but tie.
    expected = vfmk.reference.attention_pool(*(tensor.double() for tensor in args))
    assert operator_checks.relative_error(output, expected) < 1e-3


def test_a_nan_is_not_lost(device):
    tokens, queries = arguments(1100, 16, 4, device=device)
    tokens[1, 700, 3] = torch.nan
    output = vfmk.ops.attention_pool(tokens, queries)
    assert output[0].isfinite().all()
    assert output[1].isnan().all()


def test_same_bits_on_each_run(device):
    args = arguments(1100, 32, 6, device=device)
    operator_checks.check_deterministic(call(), args)
    operator_checks.check_every_element_written(call(), args)
    operator_checks.check_unwanted_gradients(call(), args)


@pytest.mark.parametrize(("tokens", "batch"), [(3000, 1), (100, 40)])
def test_same_bits_for_any_number_of_threads(tokens, batch):
    with operator_checks.target(NAME, "cpu"):
        operator_checks.check_threads(call(), arguments(tokens, 64, 16, batch=batch))


@pytest.mark.parametrize(("batch", "tokens", "queries"), [(0, 7, 3), (2, 0, 3), (2, 7, 0)])
def test_empty(device, batch, tokens, queries):
    """As softmax and a sum over nothing in plain PyTorch: zeros."""
    args = arguments(tokens, 16, queries, batch=batch, device=device)
    ours = operator_checks.value_and_gradients(call(), args)
    expected = operator_checks.value_and_gradients(vfmk.reference.attention_pool, args)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 150),
    width=st.integers(1, 80),
    queries=st.integers(1, 40),
    batch=st.integers(1, 3),
)
def test_any_shape(tokens, width, queries, batch):
    args = arguments(tokens, width, queries, batch=batch)
    operator_checks.check_accuracy(call(), args, FP32_LIMIT, LEAST_SHARE)


def test_any_cotangent(device):
    operator_checks.check_cotangents(call(), arguments(6, 8, 3, device=device))


def test_gradcheck():
    operator_checks.check_gradcheck(call(scale=0.7), arguments(5, 4, 3))


def test_opcheck(device):
    args = [operator_checks.preserving_leaf(t) for t in arguments(6, 8, 3, device=device)]
    operator_checks.check_opcheck(torch.ops.vfmk.attention_pool.default, (*args, 0.5))


def test_compile(device):
    operator_checks.check_compile(call(), arguments(6, 8, 3, device=device), batched=1)


def test_export(device):
    operator_checks.check_export(call(), arguments(6, 8, 3, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device, dtype):
    operator_checks.check_autocast(call(), arguments(6, 8, 3, device=device), dtype)


TOKENS, QUERIES = torch.zeros(2, 6, 8), torch.zeros(3, 8)
BAD_INPUT = [  # arguments, keyword arguments, exception, message
    ((None, QUERIES), {}, TypeError, r"tokens must be a Tensor \[B, N, D\], got NoneType"),
    ((TOKENS[0], QUERIES), {}, ValueError, r"tokens must have the shape \[B, N, D\], got \[6, 8\]"),
    ((TOKENS.int(), QUERIES), {}, TypeError, "tokens must be float32, .* got int32"),
    ((TOKENS, QUERIES[0]), {}, ValueError, r"queries must have the shape \[M, D\], got \[8\]"),
    ((TOKENS, QUERIES[:, :4]), {}, ValueError, "queries are 4 wide, tokens are 8"),
    ((TOKENS, QUERIES.half()), {}, TypeError, "queries is float16, tokens is float32"),
    ((TOKENS, QUERIES.to("meta")), {}, ValueError, "queries is on meta, tokens is on cpu"),
    ((TOKENS, QUERIES), {"scale": None}, TypeError, "scale must be a number, got None"),
]


@pytest.mark.parametrize(("args", "kwargs", "exception", "message"), BAD_INPUT)
def test_bad_input(args, kwargs, exception, message):
    with pytest.raises(exception, match=f"^{NAME}: {message}"):
        vfmk.ops.attention_pool(*args, **kwargs)
