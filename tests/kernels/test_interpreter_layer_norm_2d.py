"""The Triton kernels of layer_norm_2d, interpreted, against the float64 reference."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.kernels.interpreter import interpreted
from tests.operator_checks import relative_error
from vfmk.kernels import layer_norm_2d as kernels
from vfmk.reference.layer_norm_2d import backward, forward

LAYOUTS = ("nchw", "channels_last")
LIMITS = {
    torch.float32: 2e-6,
    # Of the gradients one rounding, to nearest. The interpreter truncates to bfloat16: twice that.
    torch.float16: torch.finfo(torch.float16).eps / 2,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
}
OURS, TRUE = (kernels.forward, kernels.backward), (forward, backward)


def activation(*size: int, layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    channels_last = layout == "channels_last"
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return (torch.randn(size) + 0.5).to(dtype).contiguous(memory_format=memory_format)


def run(module, input, weight, bias, index, grad_output, layout, wanted=(True, True, True)):
    """Output and the gradients, None for those not wanted."""
    last, eps = layout == "channels_last", 0.1
    output = torch.full_like(grad_output, 7)
    sums_dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    size = (input.shape[0], *input.shape[2:])
    mean, rstd = (torch.full(size, 7, dtype=sums_dtype) for _ in range(2))
    module[0](input, weight, bias, index, eps, last, output, mean, rstd)
    grad_input = torch.full_like(input.contiguous(), 7)
    if last:
        grad_input = grad_input.contiguous(memory_format=torch.channels_last)
    gradients = (grad_input, torch.full_like(weight, 7), torch.full_like(bias, 7))
    gradients = [g if want else None for g, want in zip(gradients, wanted, strict=True)]
    module[1](grad_output, input, weight, index, mean, rstd, last, *gradients)
    return [output, *gradients]


def check(input, index, layout):
    channels = input.shape[1]
    weight, bias = (torch.randn(channels).to(input.dtype) for _ in range(2))
    outputs = channels if index is None else len(index)
    shape = (input.shape[0], outputs, *input.shape[2:])
    grad_output = activation(*shape, layout=layout, dtype=input.dtype)
    ours = run(OURS, input, weight, bias, index, grad_output, layout)
    input, weight, bias, grad_output = (t.double() for t in (input, weight, bias, grad_output))
    true = run(TRUE, input, weight, bias, index, grad_output, layout)
    for value, expected in zip(ours, true, strict=True):
        assert relative_error(value, expected) <= LIMITS[ours[0].dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@interpreted
def test_maps(dtype, layout):
    torch.manual_seed(0)
    input = activation(1, 9, 5, 7, layout=layout, dtype=dtype)
    for index in (None, torch.randint(9, (12,)), torch.tensor([4, 4])):
        check(input, index, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (1, 2, 7, 15), (1, 200, 1, 3)], ids=str)
@interpreted
def test_sizes(size, layout):
    """One block and several, of channels and of pixels, whole and not."""
    torch.manual_seed(0)
    input = activation(*size, layout=layout)
    check(input, None, layout)
    check(input, torch.randint(size[1], (size[1] + 3,)), layout)


@interpreted
def test_views():
    torch.manual_seed(0)
    wider, index = torch.randn(1, 9, 6, 12), torch.randint(7, (7,))
    check(wider[:, 1:-1, 1:, 2:-1], index, "nchw")
    check(wider.permute(0, 3, 1, 2)[:, 3:10], index, "channels_last")


@interpreted
def test_unwanted_gradients_and_an_index_that_moves_bits():
    torch.manual_seed(0)
    for layout in LAYOUTS:
        input, grad_output = (activation(1, 6, 3, 15, layout=layout) for _ in range(2))
        weight, bias, index = torch.randn(6), torch.randn(6), torch.randint(6, (6,))
        every = run(OURS, input, weight, bias, index, grad_output, layout)
        for wanted in ((True, False, False), (False, True, False), (False, False, True)):
            some = run(OURS, input, weight, bias, index, grad_output, layout, wanted)
            for value, whole, want in zip(some, every, (True, *wanted), strict=True):
                assert torch.equal(value, whole) if want else value is None
        output = run(OURS, input, weight, bias, None, grad_output, layout)[0]
        assert torch.equal(every[0], output[:, index])


@pytest.mark.parametrize("layout", LAYOUTS)
@interpreted
def test_outside_is_nan(layout):
    input, grad_output = (activation(2, 6, 3, 5, layout=layout) for _ in range(2))
    index = torch.tensor([0, -1, 5, 6, 2**40, 3])
    output, *gradients = run(
        OURS, input, torch.randn(6), torch.randn(6), index, grad_output, layout
    )
    outside = torch.tensor([False, True, False, True, True, False])
    assert torch.equal(output.isnan().all((0, 2, 3)), outside)
    assert torch.equal(output.isnan().any((0, 2, 3)), outside)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert torch.equal(gradients[2] != 0, torch.tensor([1, 0, 0, 1, 0, 1]).bool())
