"""SAM's attention in Triton, forward and backward through the operators, under the interpreter."""

import pytest
import torch

import vfmk
from tests import operator_checks
from tests.kernels.interpreter import interpreted
from tests.ops import test_rel_pos_attention as whole
from tests.ops import test_window_rel_pos_attention as windowed

# bf16 under the interpreter truncates where hardware rounds: no better than one eps.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", ["ragged", "wide", "tall", "one head, batch 1", "window"])
@interpreted
def test_global(grid, dtype):
    grid_size, shape = whole.GRIDS[grid]
    args = whole.arguments(grid_size, dtype=DTYPES[dtype], **shape)
    with vfmk.use_backend("triton"):
        operator_checks.check_accuracy(
            whole.call(grid_size), args, whole.FP32_LIMIT, whole.LEAST_SHARE
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "grid",
    ["windows that fit", "padded below and right", "window beyond the grid", "SAM's 14 in 16"],
)
@interpreted
def test_windows(grid, dtype):
    grid_size, window_size, shape = windowed.GRIDS[grid]
    args = windowed.arguments(grid_size, window_size, dtype=DTYPES[dtype], **shape)
    with vfmk.use_backend("triton"):
        operator_checks.check_accuracy(
            windowed.call(window_size), args, windowed.FP32_LIMIT, windowed.LEAST_SHARE
        )


@interpreted
def test_one_token():
    with vfmk.use_backend("triton"):
        operator_checks.check_accuracy(
            whole.call((1, 1)), whole.arguments((1, 1)), whole.FP32_LIMIT, whole.LEAST_SHARE
        )


@interpreted
def test_same_bits_and_every_element():
    args = windowed.arguments((5, 6), 4)
    with vfmk.use_backend("triton"):
        operator_checks.check_deterministic(windowed.call(4), args)
        operator_checks.check_every_element_written(windowed.call(4), args)
        operator_checks.check_unwanted_gradients(windowed.call(4), args)
