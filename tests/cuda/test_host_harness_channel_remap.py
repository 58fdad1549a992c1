"""channel_remap's CUDA source on the CPU, as test_host_harness.py runs them."""

import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda.test_host_harness import (
    DTYPES,
    HOST,
    ORDERS,
    ROOT,
    compiler,
    extent,
    packed,
    same_bits,
)

# One rounding of exact products and of sums in fp32. fp32: sums of a plane, in parts.
LIMITS = {torch.float32: 1e-6} | {
    dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float16, torch.bfloat16)
}


@dataclass(frozen=True)
class Case:
    maps: int = 1
    samples: int = 2
    inputs: int = 16
    outputs: int = 16
    rows: int = 1
    columns: int = 40
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = False
    scale: bool = True
    pairs: bool = False  # few channels exchanged, all other neighbours stay so
    outside: bool = False
    slack: tuple[int, int, int] = (0, 0, 0)  # unused elements in each row (pixel), plane, sample
    misaligned: bool = False

    def __str__(self) -> str:
        default = Case()
        parts = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(default, k)]
        return " ".join(parts).replace("torch.", "").replace(", ", ",") or "default"


def activation(case: Case, channels: int, slack: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
    """Random [N, C, rows, columns] in the case's layout; NaN in the slack."""
    inner, plane, sample = slack
    if case.channels_last:
        column = channels + inner
        row = case.columns * column + plane
        strides = (case.rows * row + sample, 1, row, column)
    else:
        row = case.columns + inner
        channel = case.rows * row + plane
        strides = (channels * channel + sample, channel, row, 1)
    shape = (case.maps * case.samples, channels, case.rows, case.columns)
    storage = torch.full((extent(torch.empty_strided(shape, strides)),), torch.nan)
    return storage.to(case.dtype).as_strided(shape, strides).copy_(torch.randn(shape))


def arguments(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """input, index, scale, grad_output."""
    torch.manual_seed(0)
    index = torch.randint(case.inputs, (case.maps, case.outputs))
    if case.pairs:
        index[:] = torch.arange(case.outputs)
        index[:, 1] = 7
    if case.outside:
        index[:, 2], index[:, -1] = -1, case.inputs + 2**33
    scale = torch.randn(case.maps, case.outputs).to(case.dtype) if case.scale else None
    return activation(case, case.inputs, case.slack), index, scale, activation(case, case.outputs)


def truth(case: Case) -> list[Tensor]:
    """Output, gradients of input and scale, in float64; NaN where an index lies outside."""
    input, index, scale, grad_output = arguments(case)
    inside = (index >= 0) & (index < case.inputs)
    input, grad_output = input.double().requires_grad_(), grad_output.double()
    scale = (torch.ones(index.shape) if scale is None else scale).double().requires_grad_()
    each = index.where(inside, 0).repeat_interleave(case.samples, 0)[:, :, None, None]
    factors = (scale * inside).repeat_interleave(case.samples, 0)[:, :, None, None]
    output = input.gather(1, each.expand(grad_output.shape)) * factors
    gradients = torch.autograd.grad(output, (input, scale), grad_output)
    outside = ~inside.repeat_interleave(case.samples, 0)[:, :, None, None]
    return [
        output.detach().masked_fill(outside, torch.nan),
        gradients[0],
        gradients[1].masked_fill(~inside, torch.nan),
    ]


def run(
    program: Path, case: Case, order: str, wanted: tuple[bool, bool] = (True, True)
) -> list[Tensor | None]:
    """Output and the gradients that are wanted."""
    input, index, scale, grad_output = arguments(case)
    grad_input = activation(case, case.inputs)
    size = input.element_size()
    sizes = (case.maps, case.samples, case.inputs, case.outputs, case.rows, case.columns)
    strides = (*input.stride(), *grad_output.stride(), *grad_input.stride())
    wanted = (wanted[0], wanted[1] and case.scale)

    def header(backward: bool, *asked: int) -> bytes:
        values = [
            *(backward, ORDERS[order], size if case.misaligned else 0),
            *(DTYPES[case.dtype], case.channels_last, *sizes, *strides, *asked),
        ]
        return struct.pack(f"{len(values)}q", *map(int, values))

    activation_bytes = grad_input.numel() * size if wanted[0] else -1
    scale_bytes = index.numel() * size if wanted[1] else -1
    call = header(False, grad_output.numel() * size, -1) + packed(input, index, scale, None)
    call += header(True, activation_bytes, scale_bytes)
    call += packed(input if wanted[1] else None, index, scale, grad_output)
    process = subprocess.run([program], input=call, capture_output=True)
    assert process.returncode == 0, process.stderr.decode()
    answer = memoryview(process.stdout)

    def take(like: Tensor) -> Tensor | None:
        nonlocal answer
        (count,) = struct.unpack_from("q", answer)
        raw, answer = answer[8 : 8 + max(count, 0)], answer[8 + max(count, 0) :]
        if count < 0:
            return None
        if count == 0:
            return torch.empty_like(like)
        return torch.frombuffer(bytearray(raw), dtype=case.dtype).as_strided(
            like.shape, like.stride()
        )

    output, none = take(grad_output), take(grad_output)
    assert none is None
    return [output, take(grad_input), take(torch.empty(index.shape))]


@pytest.fixture(scope="session")
def remap(built: Callable[..., Path]) -> Path:
    source = ROOT / "csrc" / "cuda" / "channel_remap.cu"
    return built("channel_remap", compiler(HOST / "channel_remap.cpp", "-x", "c++", source))


FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
CASES = [
    *(
        Case(dtype=dtype, channels_last=last, pairs=pairs)
        for dtype in (FLOAT, HALF, BFLOAT)
        for last in (False, True)
        for pairs in (False, True)
    ),
    *(
        case
        for last in (False, True)
        for case in (
            Case(channels_last=last, maps=3),
            Case(channels_last=last, maps=2, samples=3, dtype=FLOAT, scale=False),
            Case(channels_last=last, outputs=40, dtype=FLOAT),
            Case(channels_last=last, outputs=3, inputs=5, columns=7),  # single elements
            Case(channels_last=last, outputs=1, inputs=1, columns=1, dtype=FLOAT),
            Case(channels_last=last, rows=3, columns=24, slack=(8, 16, 24)),
            Case(channels_last=last, rows=3, columns=24, slack=(3, 5, 1), dtype=FLOAT),
            Case(channels_last=last, misaligned=True),
            Case(channels_last=last, outside=True),
            Case(channels_last=last, outside=True, pairs=True, dtype=FLOAT, maps=2),
            Case(channels_last=last, columns=0),
            Case(channels_last=last, samples=0),
            Case(channels_last=last, outputs=0, inputs=3),
        )
    ),
    Case(inputs=2, outputs=3, samples=1, columns=5000),  # several blocks of a plane
    Case(inputs=2, outputs=3, samples=1, columns=2501),
    Case(inputs=24, outputs=24, samples=1, columns=1100, channels_last=True),
    Case(inputs=200, outputs=1100, columns=3, channels_last=True),  # several of the channels
    Case(inputs=1100, outputs=200, columns=3, dtype=FLOAT, channels_last=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(remap: Path, case: Case) -> None:
    first, second = (run(remap, case, order) for order in ("reverse", "shuffled"))
    for value, other, true in zip(first, second, truth(case), strict=True):
        if value is None:
            assert not case.scale
            continue
        assert same_bits(value, other), "the order of threads or blocks shows"
        assert torch.equal(value.isnan(), true.isnan())
        error = (value.double() - true).nan_to_num().norm() / true.nan_to_num().norm().clamp(1e-30)
        assert error <= LIMITS[case.dtype]


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_one_gradient_alone_has_the_same_bits(remap: Path, last: bool) -> None:
    case = Case(channels_last=last, maps=2)
    _, *every = run(remap, case, "forward")
    for n, wanted in enumerate([(True, False), (False, True)]):
        _, *alone = run(remap, case, "forward", wanted)
        assert same_bits(alone[n], every[n])
        assert alone[1 - n] is None
