"""The Triton kernels of channel_remap, interpreted, against float64 gathers."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.kernels.interpreter import interpreted
from tests.operator_checks import relative_error
from vfmk.kernels import channel_remap as kernels
from vfmk.reference.channel_remap import backward, forward

LAYOUTS = ("nchw", "channels_last")
LIMITS = {
    torch.float32: 1e-6,
    # One rounding, to nearest. The interpreter truncates to bfloat16: twice that.
    torch.float16: torch.finfo(torch.float16).eps / 2,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
}


def activation(*size: int, layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    channels_last = layout == "channels_last"
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.randn(size).to(dtype).contiguous(memory_format=memory_format)


def run(module, input, index, scale, grad_output, layout, wanted=(True, True)):
    """Output, gradients of input and scale by the functions `forward` and `backward`."""
    last = layout == "channels_last"
    output = torch.full_like(grad_output, 7)
    module[0](input, index, scale, last, output)
    grad_input = torch.full_like(input.contiguous(), 7)
    if last:
        grad_input = grad_input.contiguous(memory_format=torch.channels_last)
    grad_scale = torch.full(index.shape, 7.0, dtype=input.dtype)
    gradients = [
        g if want else None for g, want in zip((grad_input, grad_scale), wanted, strict=True)
    ]
    module[1](grad_output, input, index, scale, input.shape[1], last, *gradients)
    return [output, *gradients]


def check(input, index, scale, layout):
    shape = (input.shape[0], index.shape[1], *input.shape[2:])
    grad_output = activation(*shape, layout=layout, dtype=input.dtype)
    ours = run((kernels.forward, kernels.backward), input, index, scale, grad_output, layout)
    doubles = [t if t is None else t.double() for t in (input, scale, grad_output)]
    true = run((forward, backward), doubles[0], index, *doubles[1:], layout)
    for value, expected in zip(ours, true, strict=True):
        assert relative_error(value, expected) <= LIMITS[input.dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("maps", [1, 2, 4])
@interpreted
def test_maps(maps, dtype, layout):
    torch.manual_seed(0)
    input = activation(4, 9, 5, 7, layout=layout, dtype=dtype)
    index, scale = torch.randint(9, (maps, 12)), torch.randn(maps, 12).to(dtype)
    check(input, index, scale, layout)
    check(input, index, None, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("inputs", "outputs", "size"),
    [(1, 1, (1, 1)), (3, 1, (1, 40)), (2, 70, (33, 40)), (300, 290, (1, 3))],
    ids=str,
)
@interpreted
def test_sizes(inputs, outputs, size, layout):
    torch.manual_seed(0)
    input = activation(1, inputs, *size, layout=layout)
    check(input, torch.randint(inputs, (1, outputs)), torch.randn(1, outputs), layout)


@interpreted
def test_views():
    wider = torch.randn(2, 9, 6, 12)
    index, scale = torch.randint(7, (2, 7)), torch.randn(2, 7)
    check(wider[:, 1:-1, 1:, 2:-1], index, scale, "nchw")
    check(wider.permute(0, 3, 1, 2)[:, 3:10], index, scale, "channels_last")


@pytest.mark.parametrize("layout", LAYOUTS)
@interpreted
def test_unwanted_gradients(layout):
    """The same bits, alone or together."""
    input, grad_output = (activation(2, 6, 3, 5, layout=layout) for _ in range(2))
    index, scale = torch.randint(6, (1, 6)), torch.randn(1, 6)
    module = (kernels.forward, kernels.backward)
    every = run(module, input, index, scale, grad_output, layout)
    for n, wanted in enumerate([(True, False), (False, True)], start=1):
        alone = run(module, input, index, scale, grad_output, layout, wanted)
        assert torch.equal(alone[n], every[n])


@pytest.mark.parametrize("layout", LAYOUTS)
@interpreted
def test_outside_is_nan(layout):
    input, grad_output = (activation(2, 6, 3, 5, layout=layout) for _ in range(2))
    index, scale = torch.tensor([[0, -1, 5, 6, 2**40, 3]]), torch.randn(1, 6)
    module = (kernels.forward, kernels.backward)
    output, grad_input, grad_scale = run(module, input, index, scale, grad_output, layout)
    outside = torch.tensor([False, True, False, True, True, False])
    assert torch.equal(output.isnan().all((0, 2, 3)), outside)
    assert torch.equal(output.isnan().any((0, 2, 3)), outside)
    assert torch.equal(grad_scale[0].isnan(), outside)
    assert grad_input.isfinite().all()
    assert torch.equal(grad_input.any((0, 2, 3)), torch.tensor([1, 0, 0, 1, 0, 1]).bool())
