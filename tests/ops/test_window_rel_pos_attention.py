"""window_rel_pos_attention on every backend that runs here, against the float64 reference."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vfmk
from tests import operator_checks
from tests.operator_checks import Call
from vfmk.reference.rel_pos_attention import resized_tables

NAME = "window_rel_pos_attention"
FP32_LIMIT, LEAST_SHARE = 2e-5, 0.1  # as rel_pos_attention


def call(window_size, num_heads=3, **kwargs) -> Call:
    """Eager is SAM's way: pad, cut, attend with scores in full, merge, crop."""
    reference = vfmk.reference.window_rel_pos_attention
    return Call(
        vfmk.ops.window_rel_pos_attention,
        reference,
        reference,
        {"window_size": window_size, "num_heads": num_heads, **kwargs},
    )


def arguments(
    grid_size, window_size, *, batch=2, heads=3, width=16, dtype=torch.float32, device="cpu"
) -> tuple[Tensor, ...]:
    """qkv [B, H, W, 3·heads·d], its bias, and both tables."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (window_size, window_size) if isinstance(window_size, int) else window_size
    shapes = (
        (batch, *grid_size, 3 * heads * width),
        (3 * heads * width,),
        (2 * rows - 1, width),
        (2 * columns - 1, width),
    )
    return tuple(torch.randn(s, generator=generator).to(device, dtype) for s in shapes)


GRIDS = {
    "windows that fit": ((8, 12), 4, {}),
    "padded below and right": ((10, 9), 4, {}),
    "SAM's 14 in 16": ((16, 16), 14, {"width": 64}),
    "window beyond the grid": ((3, 5), 7, {}),
    "global": ((9, 7), (9, 7), {"width": 32}),
    "oblong windows": ((7, 12), (3, 5), {"width": 80}),
    "one token": ((1, 1), 2, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_float64(device, grid, dtype):
    if grid in ("one token",) and dtype != torch.float32:
        pytest.skip("gradients that are zero in truth hold the rounding of the saved output alone")
    grid_size, window_size, shape = GRIDS[grid]
    args = arguments(grid_size, window_size, dtype=dtype, device=device, **shape)
    operator_checks.check_accuracy(call(window_size), args, FP32_LIMIT, LEAST_SHARE)


def test_reads_a_slice_of_wider_channels(device):
    qkv, *others = arguments((6, 5), 4, device=device)
    wider = torch.cat([qkv, qkv], -1)[..., : qkv.shape[-1]]
    operator_checks.check_accuracy(call(4), (wider, *others), FP32_LIMIT, LEAST_SHARE)


def test_same_bits_on_each_run(device):
    args = arguments((10, 9), 4, device=device)
    operator_checks.check_deterministic(call(4), args)
    operator_checks.check_every_element_written(call(4), args)
    operator_checks.check_unwanted_gradients(call(4), args)


def test_the_bias_gets_no_gradient_where_nothing_is_padded(device):
    qkv, bias, *tables = arguments((8, 4), 4, device=device)
    bias.requires_grad_()
    vfmk.ops.window_rel_pos_attention(qkv, bias, *tables, 4, 3).sum().backward()
    assert not bias.grad.any()


def test_any_cotangent(device):
    operator_checks.check_cotangents(call(3), arguments((5, 4), 3, device=device))


def test_empty_batch(device):
    args = arguments((5, 4), 3, batch=0, device=device)
    output, *gradients = operator_checks.value_and_gradients(call(3), args)
    assert output.shape == (0, 5, 4, 48)
    assert not any(gradient.any() for gradient in gradients)


@settings(max_examples=40, deadline=None)
@given(
    grid_size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    window_size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    width=st.integers(1, 24),
)
def test_any_shape(grid_size, window_size, width):
    assume(window_size != (1, 1))  # gradients that are zero in truth; GRIDS has one such
    args = arguments(grid_size, window_size, batch=1, heads=2, width=width)
    operator_checks.check_accuracy(call(window_size, num_heads=2), args, FP32_LIMIT, LEAST_SHARE)


def test_gradcheck():
    args = arguments((3, 4), 2, batch=1, heads=2, width=3)
    operator_checks.check_gradcheck(call(2, num_heads=2), args)


def test_opcheck(device):
    qkv, bias, *_ = (
        operator_checks.preserving_leaf(a) for a in arguments((5, 4), 3, device=device)
    )
    packed, padding = qkv.detach().unflatten(3, (3, 3, 16)), bias.detach().unflatten(0, (3, 3, 16))
    tables = torch.randn(10, 16, device=device)
    leaves = [operator_checks.preserving_leaf(t) for t in (packed, padding, tables)]
    operator_checks.check_opcheck(
        torch.ops.vfmk.window_rel_pos_attention.default, (*leaves, (3, 3), 0.25)
    )


def test_compile(device):
    operator_checks.check_compile(
        call(3), arguments((5, 4), 3, device=device), batched=1, limit=1e-6
    )


def test_export(device):
    operator_checks.check_export(call(3), arguments((5, 4), 3, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device, dtype):
    operator_checks.check_autocast(call(3), arguments((5, 4), 3, device=device), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_interpolates_tables_in_float32(device, dtype):
    """As SAM does: rounded once, after it."""
    qkv, bias, *_ = arguments((5, 4), 3, device=device)
    tables = [torch.randn(27, 16, device=device) for _ in range(2)]
    resized = resized_tables(*tables, (3, 3))
    expected = call(3)(*(tensor.to(dtype) for tensor in (qkv, bias, *resized)))
    with torch.autocast(device, dtype):
        assert torch.equal(call(3)(qkv, bias, *tables), expected)


QKV, BIAS, TABLE = torch.zeros(2, 5, 4, 48), torch.zeros(48), torch.zeros(5, 8)
BAD_INPUT = [  # arguments, keyword arguments, exception, message
    ((QKV[0], BIAS, TABLE, TABLE), {}, ValueError, r"qkv must have the shape \[B, H, W, 3"),
    ((QKV.long(), BIAS, TABLE, TABLE), {}, TypeError, "qkv must be float32.*got int64"),
    ((QKV, BIAS[:40], TABLE, TABLE), {}, ValueError, "qkv_bias has 40 channels, qkv has 48"),
    ((QKV, BIAS.double(), TABLE, TABLE), {}, TypeError, "qkv_bias is float64, qkv is float32"),
    ((QKV, BIAS, TABLE[:, :4], TABLE), {}, ValueError, r"rel_pos_h must be \[L, 8\]"),
    ((QKV.transpose(2, 3), BIAS, TABLE, TABLE), {}, ValueError, "qkv has 4 channels"),
    ((QKV, BIAS, TABLE, TABLE), {"num_heads": 5}, ValueError, "48 channels, which 3·5 does not"),
    ((QKV, BIAS, TABLE, TABLE), {"num_heads": 2.0}, TypeError, "num_heads must be an int"),
    ((QKV, BIAS, TABLE, TABLE), {"window_size": 0}, ValueError, "window_size must be at least 1"),
    ((QKV, BIAS, TABLE, TABLE), {"scale": "1"}, TypeError, "scale must be a number, got '1'"),
]


@pytest.mark.parametrize(("args", "kwargs", "exception", "message"), BAD_INPUT)
def test_bad_input(args, kwargs, exception, message):
    with pytest.raises(exception, match=f"^{NAME}: .*{message}"):
        vfmk.ops.window_rel_pos_attention(*args, **{"window_size": 3, "num_heads": 2, **kwargs})
