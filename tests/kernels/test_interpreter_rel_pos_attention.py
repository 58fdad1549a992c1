"""SAM's attention in Triton, forward and backward through the operators, under the interpreter."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton")

import vfmk
from tests import operator_checks
from tests.kernels.interpreter import interpreted
from tests.ops import test_rel_pos_attention as whole
from tests.ops import test_window_rel_pos_attention as windowed
from vfmk.kernels import _rel_pos_plan
from vfmk.kernels import rel_pos_attention as kernels

# bf16 under the interpreter truncates where hardware rounds: no better than one eps.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# sm_90 fetches 16-bit tiles through tensor descriptors, sm_80 by pointers; their tiles differ too.
# float32 has the same on both.
ARCHITECTURES = [("fp32", (8, 0)), ("fp16", (9, 0))]
ONE = {"batch": 1, "heads": 1}
GRIDS = {
    "ragged": ((7, 11), {}),
    "wide": ((3, 40), {**ONE, "width": 32}),
    "tall": ((40, 3), {**ONE, "width": 80}),
    "rows wider than a tile": ((2, 70), ONE),
    "head width 24": ((4, 6), {"width": 24}),
    "head width 64": ((9, 8), {**ONE, "width": 64}),
    "head width 128": ((5, 6), {**ONE, "width": 128}),
}
WINDOWS = {
    "that fit": ((8, 12), 4, ONE),
    "padded below and right": ((10, 9), 4, {}),
    "beyond the grid": ((3, 5), 7, {}),
    "SAM's 14 in 16": ((16, 16), 14, {**ONE, "width": 64}),
    "oblong": ((7, 12), (3, 5), {**ONE, "width": 80}),
    "wider than a tile": ((6, 40), (3, 40), ONE),
    "of one row": ((6, 5), (1, 5), ONE),
    "of one column": ((6, 5), (6, 1), ONE),
}


@contextmanager
def triton_for(capability: tuple[int, int]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, vfmk.use_backend("triton"):
        patch.setattr(_rel_pos_plan, "capability", lambda device: capability)
        yield


@pytest.mark.parametrize(("dtype", "capability"), [*ARCHITECTURES, ("fp16", (8, 0))], ids=str)
@pytest.mark.parametrize("grid", GRIDS)
@interpreted
def test_global(grid, dtype, capability):
    grid_size, shape = GRIDS[grid]
    args = whole.arguments(grid_size, dtype=DTYPES[dtype], **shape)
    with triton_for(capability):
        operator_checks.check_accuracy(
            whole.call(grid_size), args, whole.FP32_LIMIT, whole.LEAST_SHARE
        )


@pytest.mark.parametrize(
    ("windows", "dtype", "capability"),
    [
        (windows, *architecture)
        for windows in WINDOWS
        for architecture in ARCHITECTURES
        # Gradients that are zero in truth hold the rounding of the saved output alone.
        if windows not in ("of one row", "of one column") or architecture[0] == "fp32"
    ],
    ids=str,
)
@interpreted
def test_windows(windows, dtype, capability):
    grid_size, window_size, shape = WINDOWS[windows]
    args = windowed.arguments(grid_size, window_size, dtype=DTYPES[dtype], **shape)
    with triton_for(capability):
        operator_checks.check_accuracy(
            windowed.call(window_size, shape.get("heads", 3)),
            args,
            windowed.FP32_LIMIT,
            windowed.LEAST_SHARE,
        )


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
@interpreted
def test_any_layout_gives_the_same_bits(capability):
    """A batch of one has a stride of no use, which a tensor descriptor would refuse."""
    packed = whole.arguments((4, 6), batch=1, heads=2, dtype=torch.float16)
    dense = [tensor.contiguous() for tensor in packed[:3]]
    apart = [tensor.as_strided(tensor.shape, (7, *tensor.stride()[1:])) for tensor in dense]
    with triton_for(capability):
        of_packed, of_apart = (
            operator_checks.value_and_gradients(whole.call((4, 6)), (*qkv, *packed[3:]))
            for qkv in (packed[:3], apart)
        )
    assert all(torch.equal(a, b) for a, b in zip(of_packed, of_apart, strict=True))


@interpreted
def test_any_cotangent():
    """Descriptors take no stride of zero: such a cotangent is read by pointers."""
    args = whole.arguments((3, 4), heads=1, dtype=torch.float16)
    with triton_for((9, 0)):
        operator_checks.check_cotangents(whole.call((3, 4)), args)


@interpreted
def test_any_cotangent_of_windows():
    args = windowed.arguments((3, 2), 2, heads=1)
    with triton_for((8, 0)):
        operator_checks.check_cotangents(windowed.call(2, num_heads=1), args)


@pytest.mark.parametrize("channels", [16, 24])
@pytest.mark.parametrize(("dtype", "capability"), ARCHITECTURES, ids=str)
@interpreted
def test_windows_keep_a_nan_to_themselves(dtype, capability, channels):
    qkv, *others = windowed.arguments(
        (6, 10), (3, 5), batch=1, heads=1, width=channels, dtype=DTYPES[dtype]
    )
    call = windowed.call((3, 5), num_heads=1)
    with triton_for(capability):
        expected = operator_checks.value_and_gradients(call, (qkv, *others))
        qkv[:, :3, 5:] = torch.nan
        output, grad_qkv, *_ = operator_checks.value_and_gradients(call, (qkv, *others))
    elsewhere = torch.ones(6, 10, dtype=torch.bool)
    elsewhere[:3, 5:] = False
    for result, true in zip((output, grad_qkv), expected, strict=False):
        assert torch.equal(result[:, elsewhere], true[:, elsewhere])
        assert result[:, ~elsewhere].isnan().any()


@interpreted
def test_large_scores():
    """Weights from 1 down to where float32 ends."""
    args = tuple(10 * tensor for tensor in whole.arguments((7, 11), **ONE))
    with triton_for((8, 0)):
        results = operator_checks.value_and_gradients(whole.call((7, 11)), args)
    truth = operator_checks.value_and_gradients(
        functools.partial(vfmk.reference.rel_pos_attention, grid_size=(7, 11)),
        tuple(tensor.double() for tensor in args),
    )
    for result, true in zip(results, truth, strict=True):
        # Scores near 1e3, which float32 resolves to 6e-5; so are the weights made from them.
        assert operator_checks.relative_error(result, true) <= 5e-4


@interpreted
def test_one_token():
    with triton_for((8, 0)):
        operator_checks.check_accuracy(
            whole.call((1, 1)), whole.arguments((1, 1), **ONE), whole.FP32_LIMIT, whole.LEAST_SHARE
        )


@interpreted
def test_same_bits_and_every_element():
    args = windowed.arguments((5, 6), 4, batch=1)
    with triton_for((8, 0)):
        operator_checks.check_deterministic(windowed.call(4), args)
        operator_checks.check_every_element_written(windowed.call(4), args)
        operator_checks.check_unwanted_gradients(windowed.call(4), args)


@interpreted
def test_empty_batch():
    args = windowed.arguments((5, 6), 4, batch=0)
    with triton_for((8, 0)):
        output, grad_qkv, *others = operator_checks.value_and_gradients(windowed.call(4), args)
    assert output.shape[0] == grad_qkv.shape[0] == 0
    assert not any(gradient.any() for gradient in others)


@interpreted
def test_not_supported():
    def reason(batch, height, width, heads, head_width, window_size=None) -> str:
        query = torch.empty(
            (batch, height, width, heads, head_width), dtype=torch.float16, device="meta"
        )
        return kernels.not_supported(query, window_size or (height, width))

    assert reason(1, 600, 600, 16, 80) == ""
    assert reason(1, 20000, 20000, 1, 64, (4, 4)) == ""
    assert "a grid of 1300 x 1300" in reason(1, 1300, 1300, 1, 64)
    assert "with 4000 heads" in reason(1, 40, 600, 4000, 64)
    assert "in windows of 16 x 1" in reason(1, 16, 2**20, 1, 32, (16, 1))
    assert "a batch of 65536" in reason(2**16, 2, 2, 1, 16)
    assert "with 60000 heads" in reason(60000, 1, 1, 60000, 1)
    assert "head width 136" in reason(1, 2, 2, 1, 136)
    crowd = whole.arguments((1, 1), batch=2**16, heads=1)
    with vfmk.use_backend("triton"), pytest.raises(vfmk.BackendError, match="a batch of 65536"):
        vfmk.ops.rel_pos_attention(*crowd, (1, 1))
