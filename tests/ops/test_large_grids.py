"""Both attention operators on the grids of whole images, where scores in full would be too many.

The gradient that comes back is zero but for a few queries all over the grid. Then these queries
alone decide every gradient, and float64 needs the scores of no others.
"""

import pytest
import torch
from torch import Tensor

import vfmk
from tests import operator_checks
from tests.operator_checks import TARGETS, Call, preserving_leaf, relative_error

LIMIT = 2e-5  # as rel_pos_attention
STRIDE = 37  # between those queries; prime to the sizes of blocks
GRIDS = [(40, 50), (64, 64), (96, 96)]


def attend(
    query: Tensor, key: Tensor, value: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor,
    grid_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Every STRIDE-th query's output [B, heads, N / STRIDE, d], as SAM writes the bias."""
    height, width = grid_size
    tokens = torch.arange(height * width, device=query.device)
    asking = tokens[::STRIDE]
    row, column = tokens // width, tokens % width
    query = query[:, :, asking]
    on_rows = query @ rel_pos_h.T  # [B, heads, N / STRIDE, L]
    on_columns = query @ rel_pos_w.T
    apart_h = (row[asking, None] - row + height - 1).expand(*query.shape[:2], -1, -1)
    apart_w = (column[asking, None] - column + width - 1).expand(*query.shape[:2], -1, -1)
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    scores = scores + on_rows.gather(3, apart_h) + on_columns.gather(3, apart_w)
    return scores.softmax(-1) @ value


def value_and_gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return [output, *torch.autograd.grad(output, leaves, cotangent.to(output))]


@pytest.mark.parametrize("target", TARGETS[1:])  # the reference stores the scores in full
@pytest.mark.parametrize("grid_size", GRIDS, ids=str)
def test_global(target, grid_size):
    backend, device = target
    height, width = grid_size
    shapes = [(1, 2, height * width, 16)] * 3 + [(2 * height - 1, 16), (2 * width - 1, 16)]
    with operator_checks.target("rel_pos_attention", backend):
        args = random_tensors(shapes, device)
        leaves = [preserving_leaf(arg) for arg in args]
        output = vfmk.ops.rel_pos_attention(*leaves, grid_size)
        ours = value_and_gradients(output[:, :, ::STRIDE], leaves)
    doubles = [preserving_leaf(arg.double()) for arg in args]
    truth = value_and_gradients(attend(*doubles, grid_size), doubles)
    for actual, true in zip(ours, truth, strict=True):
        assert relative_error(actual, true) <= LIMIT


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("grid_size", GRIDS, ids=str)
def test_windows(target, grid_size):
    backend, device = target
    shapes = [(1, *grid_size, 3 * 2 * 16), (3 * 2 * 16,), (27, 16), (27, 16)]
    reference = vfmk.reference.window_rel_pos_attention
    call = Call(
        vfmk.ops.window_rel_pos_attention, reference, reference, {"window_size": 14, "num_heads": 2}
    )
    with operator_checks.target("window_rel_pos_attention", backend):
        operator_checks.check_accuracy(call, tuple(random_tensors(shapes, device)), LIMIT)


def random_tensors(shapes: list[tuple[int, ...]], device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]
