"""The Triton kernels of dynamic_depthwise_conv2d, interpreted, against float64 convolutions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from tests.kernels.interpreter import interpreted
from tests.operator_checks import relative_error
from vfmk.kernels import dynamic_depthwise_conv2d as kernels

LAYOUTS = ("nchw", "channels_last")
LIMITS = {
    torch.float32: 3e-6,
    # One rounding of exact sums, to nearest. The interpreter truncates to bfloat16: twice that.
    torch.float16: torch.finfo(torch.float16).eps / 2,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
}
UNDILATED = (1, 1)
# Strips take small kernels without dilation, tiles the rest: one case of each.
STRIPS_AND_TILES = pytest.mark.parametrize("dilation", [UNDILATED, (2, 2)], ids=["strips", "tiles"])


def same(kernel_size: tuple[int, int], dilation: tuple[int, int] = UNDILATED) -> tuple[int, ...]:
    """Padding (top, bottom, left, right) that keeps the size; of an odd total, less comes first."""
    vertical, horizontal = ((k - 1) * step for k, step in zip(kernel_size, dilation, strict=True))
    return (vertical // 2, -(-vertical // 2), horizontal // 2, -(-horizontal // 2))


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    channels_last = layout == "channels_last"
    return tensor.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def poisoned(like: Tensor) -> Tensor:
    return torch.full_like(like, torch.nan)


class Case:
    """Arguments of one call: `input` as given, the rest random."""

    def __init__(
        self,
        input: Tensor,
        layout: str,
        kernel_size: tuple[int, int],
        padding: tuple[int, ...] | None = None,
        dilation: tuple[int, int] = UNDILATED,
        kernel_batch: int | None = None,
        bias: bool = True,
    ):
        batch, channels, height, width = input.shape
        kernel_batch = batch if kernel_batch is None else kernel_batch
        self.input, self.layout, self.dilation = input, layout, dilation
        self.padding = same(kernel_size, dilation) if padding is None else padding
        top, bottom, left, right = self.padding
        output_size = (
            height + top + bottom - dilation[0] * (kernel_size[0] - 1),
            width + left + right - dilation[1] * (kernel_size[1] - 1),
        )
        self.weight = torch.randn(kernel_batch, channels, *kernel_size).to(input.dtype)
        self.bias = torch.randn(kernel_batch, channels).to(input.dtype) if bias else None
        grad_output = torch.randn(batch, channels, *output_size).to(input.dtype)
        self.grad_output = in_layout(grad_output, layout)

    def forward(self) -> Tensor:
        output = poisoned(self.grad_output)
        kernels.forward(self.input, self.weight, self.bias, self.padding, self.dilation, output)
        return output

    def backward(self, *wanted: bool) -> list[Tensor | None]:
        """Gradients of input, weight and bias."""
        bias = torch.empty(self.weight.shape[:2], dtype=self.weight.dtype)
        like = (in_layout(torch.empty(self.input.shape).to(self.input), self.layout), self.weight)
        gradients = [
            poisoned(tensor) if want else None
            for tensor, want in zip((*like, bias), wanted, strict=True)
        ]
        kernels.backward(
            self.grad_output, self.input, self.weight, self.padding, self.dilation, *gradients
        )
        return gradients

    def truth(self) -> list[Tensor]:
        """Output and the three gradients, in float64."""
        batch, channels = self.input.shape[:2]
        input, weight = (t.double().requires_grad_() for t in (self.input, self.weight))
        bias = torch.zeros(self.weight.shape[:2]) if self.bias is None else self.bias
        bias = bias.double().requires_grad_()
        top, bottom, left, right = self.padding
        output = F.conv2d(
            F.pad(input, (left, right, top, bottom)).flatten(0, 1)[None],
            weight.expand(batch, -1, -1, -1).flatten(0, 1)[:, None],
            bias.expand(batch, -1).flatten(),
            groups=batch * channels,
            dilation=self.dilation,
        ).unflatten(1, (batch, channels))[0]
        return [output, *torch.autograd.grad(output, (input, weight, bias), self.grad_output)]


def check(case: Case) -> None:
    results = [case.forward(), *case.backward(True, True, True)]
    limit = LIMITS[case.input.dtype]
    names = ("output", "grad_input", "grad_weight", "grad_bias")
    for name, result, truth in zip(names, results, case.truth(), strict=True):
        error = relative_error(result, truth)
        assert error <= limit, f"{name}: relative error {error:.1e} > {limit:.1e}"


def random_input(*size: int, layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return in_layout(torch.randn(size).to(dtype), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "kernel_size", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (7, 7), (3, 5), (9, 9)], ids=str
)
@interpreted
def test_kernel_sizes(kernel_size, layout):
    check(Case(random_input(2, 2, 5, 7, layout=layout), layout, kernel_size))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (17, 33)], ids=str)
@interpreted
def test_ragged_sizes(size, layout):
    check(Case(random_input(2, 3, *size, layout=layout), layout, (3, 3)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("side", "dtype"),
    [(side, torch.float32) for side in (3, 4, 5, 7)]
    + [(side, dtype) for side in (3, 5) for dtype in (torch.float16, torch.bfloat16)],
    ids=str,
)
@interpreted
def test_full_vectors(side, dtype, layout):
    """16-byte rows in NCHW, channels that divide evenly in channels-last."""
    size = (1, 2, 9, 16) if layout == "nchw" else (1, 40, 6, 9)
    check(Case(random_input(*size, layout=layout, dtype=dtype), layout, (side, side)))


@pytest.mark.parametrize("layout", LAYOUTS)
@STRIPS_AND_TILES
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 0, 0, 2), (6, 5, 7, 8)], ids=str)
@interpreted
def test_padding(padding, dilation, layout):
    """None, uneven, and more than the kernel reaches."""
    input = random_input(1, 3, 7, 8, layout=layout)
    check(Case(input, layout, (3, 3), padding, dilation))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("kernel_size", "dilation"), [((3, 3), (2, 2)), ((2, 3), (3, 1)), ((5, 1), (1, 2))], ids=str
)
@interpreted
def test_dilation(kernel_size, dilation, layout):
    input = random_input(1, 3, 8, 9, layout=layout)
    check(Case(input, layout, kernel_size, dilation=dilation))


@STRIPS_AND_TILES
@interpreted
def test_views(dilation):
    wider = random_input(2, 6, 9, 24, layout="nchw")
    for view in (
        wider[:, 1::4, ::2, 8:16],  # rows still in vectors
        wider[:, 1::4, 1:8, 2:11],
        wider[:1, :2].expand(2, -1, -1, -1),
    ):
        check(Case(view, "nchw", (3, 3), dilation=dilation))
    tokens = torch.randn(2, 5, 12, 16)
    for channels in (slice(4, 12), slice(3, 8)):
        view = tokens[:, :, ::2, channels].permute(0, 3, 1, 2)
        check(Case(view, "channels_last", (3, 3), dilation=dilation))


@pytest.mark.parametrize("layout", LAYOUTS)
@interpreted
def test_offsets_beyond_32_bits(layout):
    """A batch of items 2**30 elements apart; of what lies between, no page is touched."""
    strides = (12, 4, 1) if layout == "nchw" else (1, 8, 2)
    memory = torch.empty(2**31 + 48, dtype=torch.float16)
    input = memory.as_strided((3, 2, 3, 4), (2**30, *strides))
    input.copy_(torch.randn(input.shape))
    check(Case(input, layout, (3, 3)))
    check(Case(input, layout, (3, 3), dilation=(2, 2)))


@pytest.mark.parametrize("layout", LAYOUTS)
@STRIPS_AND_TILES
@interpreted
def test_one_kernel_set_for_the_batch(dilation, layout):
    input = random_input(2, 2, 5, 8, layout=layout)
    check(Case(input, layout, (3, 3), dilation=dilation, kernel_batch=1))
    check(Case(input, layout, (3, 3), dilation=dilation, bias=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@STRIPS_AND_TILES
@interpreted
def test_plane_over_several_programs(dilation, layout):
    """Partial sums. The mean of 1 makes every sum grow along the plane."""
    channels, width = (1, 67) if layout == "nchw" else (12, 21)
    input = random_input(1, channels, 65, width, layout=layout) + 1
    case = Case(input, layout, (3, 3), dilation=dilation)
    case.grad_output += 1
    check(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@STRIPS_AND_TILES
@pytest.mark.parametrize("padding", [None, (0, 3, 0, 0)], ids=["same", "uneven"])
@interpreted
def test_unwanted_gradients(padding, dilation, layout):
    """The same bits, alone or together, and on a second run."""
    case = Case(random_input(1, 2, 6, 8, layout=layout), layout, (3, 3), padding, dilation)
    every = case.backward(True, True, True)
    assert torch.equal(case.forward(), case.forward())
    for wanted in [(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        for want, alone, full in zip(wanted, case.backward(*wanted), every, strict=True):
            assert torch.equal(alone, full) if want else alone is None, wanted
    assert case.backward(False, False, False) == [None, None, None]


@pytest.mark.parametrize("layout", LAYOUTS)
@interpreted
def test_empty(layout):
    for size, kernel_batch in (((0, 3, 4, 5), 0), ((0, 3, 4, 5), 1), ((2, 0, 4, 5), 2)):
        input = random_input(*size, layout=layout)
        case = Case(input, layout, (3, 3), kernel_batch=kernel_batch)
        assert case.forward().shape == size
        _, grad_weight, grad_bias = case.backward(True, True, True)
        assert not grad_weight.any()
        assert not grad_bias.any()
    # Nothing but padding: each output is its bias.
    for dilation in (UNDILATED, (1, 2)):
        input = random_input(2, 3, 0, 5, layout="nchw")
        case = Case(input, "nchw", (3, 3), (2, 2, 2, 2), dilation)
        output = case.forward()
        assert torch.equal(output, case.bias[:, :, None, None].expand(output.shape))
        _, grad_weight, grad_bias = case.backward(True, True, True)
        assert not grad_weight.any()
        assert relative_error(grad_bias, case.grad_output.sum((2, 3))) <= LIMITS[torch.float32]


def test_not_supported():
    def reason(*size: int) -> str:
        tensors = [torch.empty(shape, device="meta") for shape in (size, (*size[:2], 3, 3))]
        return kernels.not_supported(*tensors, (1, 1, 1, 1))

    assert reason(2, 2, 4, 4) == ""
    assert "too large" in reason(1, 1, 2**15, 2**15)
    assert "too many" in reason(2**16, 2**16, 1, 1)
