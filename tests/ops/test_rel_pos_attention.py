"""rel_pos_attention on every backend that runs here, against the float64 reference."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vfmk
from tests import operator_checks
from tests.operator_checks import Call
from vfmk.reference.rel_pos_attention import resized_tables

NAME = "rel_pos_attention"
# Two products of up to 128 and N terms, an exponential, the bias, and interpolated tables.
FP32_LIMIT = 2e-5
# A softmax that has all but chosen one key leaves gradients that are differences of near equals.
LEAST_SHARE = 0.1
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def call(grid_size, **kwargs) -> Call:
    """Eager is SAM's own arithmetic, which the reference writes out."""
    reference = vfmk.reference.rel_pos_attention
    return Call(
        vfmk.ops.rel_pos_attention, reference, reference, {"grid_size": grid_size, **kwargs}
    )


def arguments(
    grid_size, *, batch=2, heads=3, width=16, tables=None, dtype=torch.float32, device="cpu",
    layout="packed",
) -> tuple[Tensor, ...]:  # fmt: skip
    """Query, key, value [B, heads, N, d] and both tables, of 2·size − 1 entries by default."""
    generator = torch.Generator().manual_seed(0)
    height, columns = grid_size
    tokens = height * columns

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    if layout == "packed":  # views into one projection, as in SAM
        qkv = random(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        qkv = [random(batch, heads, tokens, width) for _ in range(3)]
    lengths = tables or (2 * height - 1, 2 * columns - 1)
    return (*qkv, *(random(length, width) for length in lengths))


GRIDS = {
    "window": ((14, 14), {}),
    "global": ((16, 16), {"width": 64}),
    "ragged": ((7, 11), {}),
    "one row": ((1, 9), {}),
    "one token": ((1, 1), {}),
    "wide": ((3, 40), {"width": 32}),
    "tall": ((40, 3), {"width": 80}),
    "head width 128": ((5, 6), {"width": 128}),
    "odd head width": ((5, 6), {"width": 20}),
    "one head, batch 1": ((9, 8), {"batch": 1, "heads": 1, "width": 64}),
    "tables to interpolate": ((6, 5), {"tables": (27, 127)}),
    "tables to stretch": ((6, 9), {"tables": (5, 3)}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["packed", "dense"])
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_float64(device, grid, layout, dtype):
    if grid in ("one row", "one token") and dtype != torch.float32:
        pytest.skip("gradients that are zero in truth hold the rounding of the saved output alone")
    grid_size, shape = GRIDS[grid]
    args = arguments(grid_size, dtype=dtype, device=device, layout=layout, **shape)
    operator_checks.check_accuracy(call(grid_size), args, FP32_LIMIT, LEAST_SHARE)


def test_scale(device):
    operator_checks.check_accuracy(
        call((4, 5), scale=0.5), arguments((4, 5), device=device), FP32_LIMIT
    )


def test_large_scores_stay_finite(device):
    query, *others = arguments((6, 7), device=device)
    output, *gradients = operator_checks.value_and_gradients(call((6, 7)), (100 * query, *others))
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))
    expected = vfmk.reference.rel_pos_attention(100 * query, *others, (6, 7))
    assert operator_checks.relative_error(output, expected) < 1e-4


def test_same_bits_on_each_run(device):
    args = arguments((9, 14), device=device, width=32)
    operator_checks.check_deterministic(call((9, 14)), args)
    operator_checks.check_every_element_written(call((9, 14)), args)
    operator_checks.check_unwanted_gradients(call((9, 14)), args)


def test_same_bits_for_any_number_of_threads():
    with operator_checks.target(NAME, "cpu"):
        operator_checks.check_threads(call((20, 24)), arguments((20, 24), width=32), limit=1e-6)


def test_any_cotangent(device):
    operator_checks.check_cotangents(call((3, 4)), arguments((3, 4), device=device))


def test_empty_batch(device):
    args = arguments((3, 4), batch=0, device=device)
    output, *gradients = operator_checks.value_and_gradients(call((3, 4)), args)
    assert output.shape == args[0].shape
    assert not any(gradient.any() for gradient in gradients)


def test_output_is_dense_by_tokens(device):
    """What SAM's output projection reads next needs no copy."""
    args = arguments((3, 4), device=device)
    assert vfmk.ops.rel_pos_attention(*args, (3, 4)).transpose(1, 2).is_contiguous()


@settings(max_examples=40, deadline=None)
@given(
    grid_size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    width=st.integers(1, 40),
)
def test_any_shape(grid_size, batch, heads, width):
    assume(grid_size != (1, 1))  # gradients that are zero in truth; GRIDS has one such
    args = arguments(grid_size, batch=batch, heads=heads, width=width)
    operator_checks.check_accuracy(call(grid_size), args, FP32_LIMIT, LEAST_SHARE)


def test_gradcheck():
    operator_checks.check_gradcheck(call((2, 3)), arguments((2, 3), width=4, heads=2))


def test_opcheck(device):
    query, key, value, *_ = arguments((2, 3), device=device)
    grids = [
        operator_checks.preserving_leaf(t.unflatten(2, (2, 3)).permute(0, 2, 3, 1, 4))
        for t in (query, key, value)
    ]
    tables = torch.randn(3 + 5, 16, device=device, requires_grad=True)
    operator_checks.check_opcheck(
        torch.ops.vfmk.rel_pos_attention.default, (*grids, tables, (2, 3), 0.25)
    )


def test_compile(device):
    operator_checks.check_compile(
        call((3, 4)), arguments((3, 4), device=device), batched=3, limit=1e-6
    )


def test_export(device):
    operator_checks.check_export(call((3, 4)), arguments((3, 4), device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device, dtype):
    operator_checks.check_autocast(call((3, 4)), arguments((3, 4), device=device), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_interpolates_tables_in_float32(device, dtype):
    """As SAM does: rounded once, after it."""
    *qkv, table_h, table_w = arguments((6, 7), tables=(27, 27), device=device)
    resized = resized_tables(table_h, table_w, (6, 7))
    expected = call((6, 7))(*(tensor.to(dtype) for tensor in (*qkv, *resized)))
    with torch.autocast(device, dtype):
        output = call((6, 7))(*qkv, table_h, table_w)
    assert torch.equal(output, expected)


def test_grid_size_of_a_square(device):
    args = arguments((4, 4), device=device)
    assert torch.equal(call(4)(*args), call((4, 4))(*args))


def test_differentiable_once(device):
    args = [operator_checks.preserving_leaf(arg) for arg in arguments((3, 4), device=device)]
    output, log_sum_exp = torch.ops.vfmk.rel_pos_attention(
        *(t.unflatten(2, (3, 4)).permute(0, 2, 3, 1, 4) for t in args[:3]),
        torch.cat(args[3:]), (3, 4), 0.25,
    )  # fmt: skip
    assert output.requires_grad
    assert not log_sum_exp.requires_grad


def test_one_dtype_at_the_kernel(device):
    """What the public function ensures; the kernels take it as given."""
    grids = [
        t.unflatten(2, (3, 4)).permute(0, 2, 3, 1, 4) for t in arguments((3, 4), device=device)[:3]
    ]
    tables = torch.zeros(5 + 7, 16, device=device, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=f"^{NAME}: tables is bfloat16, query is float32"):
        torch.ops.vfmk.rel_pos_attention(*grids, tables, (3, 4), 0.25)


Q, TABLE_H, TABLE_W = torch.zeros(2, 3, 6, 8), torch.zeros(3, 8), torch.zeros(5, 8)
GOOD = (Q, Q, Q, TABLE_H, TABLE_W)


def replaced(**tensors) -> tuple[Tensor, ...]:
    names = ("query", "key", "value", "rel_pos_h", "rel_pos_w")
    return tuple(tensors.get(name, good) for name, good in zip(names, GOOD, strict=True))


BAD_INPUT = [  # arguments, keyword arguments, exception, message
    (replaced(query=None), {}, TypeError, "query must be a Tensor"),
    (replaced(key=Q[0]), {}, ValueError, r"key must have the shape \[B, heads, N, d\]"),
    (replaced(value=Q[:, :2]), {}, ValueError, r"value is \[2, 2, 6, 8\], query is \[2, 3, 6, 8\]"),
    (replaced(key=Q.half()), {}, TypeError, "key is float16, query is float32"),
    (replaced(key=Q.to("meta")), {}, ValueError, "key is on meta, query is on cpu"),
    (
        replaced(query=Q.repeat(1, 1, 1, 2)[..., ::2]),
        {},
        ValueError,
        "query must have a dense last",
    ),
    (replaced(rel_pos_h=TABLE_H[:, :4]), {}, ValueError, r"rel_pos_h must be \[L, 8\], got \[3, 4"),
    (replaced(rel_pos_w=TABLE_W[:0]), {}, ValueError, r"rel_pos_w must be \[L, 8\], got \[0, 8"),
    (replaced(rel_pos_w=TABLE_W.half()), {}, TypeError, "rel_pos_w is float16, query is float32"),
    (GOOD, {"grid_size": (3, 3)}, ValueError, "grid_size 3×3 has 9 places, query has 6 tokens"),
    (GOOD, {"grid_size": (0, 6)}, ValueError, "grid_size must be at least 1"),
    (GOOD, {"grid_size": "2x3"}, TypeError, "grid_size must be an int or a pair of ints"),
    (GOOD, {"grid_size": 3}, ValueError, "grid_size 3×3 has 9 places, query has 6 tokens"),
    (GOOD, {"scale": "1"}, TypeError, "scale must be a number, got '1'"),
]


@pytest.mark.parametrize(("args", "kwargs", "exception", "message"), BAD_INPUT)
def test_bad_input(args, kwargs, exception, message):
    with pytest.raises(exception, match=f"^{NAME}: .*{message}"):
        vfmk.ops.rel_pos_attention(*args, **{"grid_size": (2, 3), **kwargs})


def test_heads_wider_than_the_kernels():
    wide = torch.zeros(1, 1, 6, 136)
    with pytest.raises(ValueError, match="query has heads of width 136, expected 1 to 128"):
        vfmk.ops.rel_pos_attention(wide, wide, wide, wide[0, 0, :3], wide[0, 0, :5], (2, 3))
