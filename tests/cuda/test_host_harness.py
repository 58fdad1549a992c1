"""The CUDA sources run on the CPU: g++ compiles them against tests/cuda_host, under the address and
undefined-behaviour sanitizers, and each result is held against PyTorch in float64.

Blocks, and threads between two barriers, run in more than one order: a result that depends on it
is a race. Outputs and shared memory start as NaN, and buffers end where their last element does.
"""

import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[2]
HOST = ROOT / "tests" / "cuda_host"
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# ‖error‖ / ‖truth‖. Half precision: exact products, summed in fp32, rounded once. fp32: sums of up
# to 50 terms for an output, of some thousand in 128 parts for the weight's gradient.
LIMITS = {torch.float32: 1e-6} | {
    dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float16, torch.bfloat16)
}
GRADIENTS = ("input", "weight", "bias")


@dataclass(frozen=True)
class Case:
    batch: int = 1
    channels: int = 3
    height: int = 20
    width: int = 40
    kernel: tuple[int, int] = (3, 3)
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = False
    padding: tuple[int, int, int, int] | None = None  # top, bottom, left, right; None: "same"
    dilation: tuple[int, int] = (1, 1)
    shared_weight: bool = False
    shared_bias: bool = False
    bias: bool = True
    wanted: tuple[str, ...] = GRADIENTS
    slack: tuple[int, int, int] = (0, 0, 0)  # unused elements in each row (pixel), plane, sample
    misaligned: bool = False
    multiprocessors: int = 1  # few: large tiles, many channels in a block; 0: many tiles, too

    def __str__(self) -> str:
        default = Case()
        parts = []
        for name, value in vars(self).items():
            if value is True:
                parts.append(name)
            elif value != getattr(default, name):
                parts.append(f"{name}={value}".replace("torch.", "").replace(", ", ","))
        return " ".join(parts) or "default"

    @property
    def pads(self) -> tuple[int, int, int, int]:
        if self.padding is not None:
            return self.padding
        rows, columns = (d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))
        return rows // 2, rows - rows // 2, columns // 2, columns - columns // 2

    @property
    def output_size(self) -> tuple[int, int]:
        top, bottom, left, right = self.pads
        rows, columns = (d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))
        return self.height + top + bottom - rows, self.width + left + right - columns


def extent(tensor: Tensor) -> int:
    """Elements from the first to the last that a view touches."""
    if tensor.numel() == 0:
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)


def activation(case: Case, height: int, width: int, slack: Sequence[int] = (0, 0, 0)) -> Tensor:
    """Random [B,C,H,W] in the case's layout; NaN in the slack."""
    inner, plane, sample = slack
    if case.channels_last:
        column = case.channels + inner
        row = width * column + plane
        strides = (height * row + sample, 1, row, column)
    else:
        row = width + inner
        channel = height * row + plane
        strides = (case.channels * channel + sample, channel, row, 1)
    shape = (case.batch, case.channels, height, width)
    storage = torch.full((extent(torch.empty_strided(shape, strides)),), torch.nan)
    tensor = storage.to(case.dtype).as_strided(shape, strides)
    return tensor.copy_(torch.randn(shape, dtype=torch.float64))


def arguments(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """input, weight, bias, grad_output."""
    torch.manual_seed(0)
    samples = [1 if shared else case.batch for shared in (case.shared_weight, case.shared_bias)]
    bias = torch.randn(samples[1], case.channels).to(case.dtype) if case.bias else None
    return (
        activation(case, case.height, case.width, case.slack),
        torch.randn(samples[0], case.channels, *case.kernel).to(case.dtype),
        bias,
        activation(case, *case.output_size),
    )


def truth(case: Case, tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Output and gradients, in float64."""
    *inputs, grad_output = (None if t is None else t.double() for t in tensors)
    leaves = [None if leaf is None else leaf.requires_grad_() for leaf in inputs]
    source, weight, bias = leaves
    top, bottom, left, right = case.pads
    padded = F.pad(source, (left, right, top, bottom))
    height, width = case.output_size
    output = torch.zeros_like(grad_output)
    for i in range(case.kernel[0]):
        for j in range(case.kernel[1]):
            y, x = i * case.dilation[0], j * case.dilation[1]
            taps = weight[:, :, i, j, None, None]
            output = output + taps * padded[:, :, y : y + height, x : x + width]
    if bias is not None:
        output = output + bias[:, :, None, None]
    output.backward(grad_output)
    return [output.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def packed(*tensors: Tensor | None) -> bytes:
    """For each its byte count (-1: null) and its bytes, as far as the view reaches."""
    parts = []
    for tensor in tensors:
        if tensor is None:
            parts.append(struct.pack("q", -1))
        else:
            raw = tensor.as_strided((extent(tensor),), (1,)).view(torch.uint8).numpy().tobytes()
            parts += [struct.pack("q", len(raw)), raw]
    return b"".join(parts)


def run(program: Path, case: Case, orders: Iterable[str]) -> list[list[Tensor | None]]:
    """Output and gradients for each order, None where nobody asks."""
    source, weight, bias, grad_output = arguments(case)
    grad_input = activation(case, case.height, case.width)
    results = [grad_output, grad_input, weight, bias]  # in shape and strides
    top, _, left, _ = case.pads
    size = source.element_size()

    def header(is_backward: bool, order: str) -> bytes:
        asked = [not is_backward, *(is_backward and name in case.wanted for name in GRADIENTS)]
        values = [
            *(is_backward, ORDERS[order], case.multiprocessors, size if case.misaligned else 0),
            *(DTYPES[case.dtype], case.channels_last, case.shared_weight, case.shared_bias),
            *(case.batch, case.channels, case.height, case.width, *case.output_size),
            *(*case.kernel, top, left, *case.dilation),
            *(*source.stride(), *grad_output.stride(), *grad_input.stride()),
            *(
                result.numel() * size if ask and result is not None else -1
                for result, ask in zip(results, asked, strict=True)
            ),
        ]
        return struct.pack(f"{len(values)}q", *map(int, values))

    calls = []
    for order in orders:
        calls += [header(False, order), packed(source, weight, bias, None)]
        calls += [header(True, order), packed(source, weight, None, grad_output)]
    process = subprocess.run([program], input=b"".join(calls), capture_output=True)
    assert process.returncode == 0, process.stderr.decode()
    answer = memoryview(process.stdout)

    def take(like: Tensor | None) -> Tensor | None:
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

    written = []
    for _ in orders:
        output, *_ = [take(like) for like in results]
        _, *gradients = [take(like) for like in results]
        written.append([output, *gradients])
    assert len(answer) == 0
    return written


def same_bits(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    bits = torch.int32 if first.element_size() == 4 else torch.int16
    return torch.equal(first.view(bits), second.view(bits))


def compiler(*sources: str | Path) -> Callable[[Path], None]:
    """Makes a program of `sources`, against the stand-ins for CUDA's headers."""
    executable = shutil.which("g++")
    if executable is None:
        pytest.skip("no g++")

    def make(program: Path) -> None:
        command = [
            *(executable, "-std=c++17", "-O1", "-g1", "-Wall", "-Wno-unknown-pragmas", "-Werror"),
            *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
            "-fno-strict-aliasing",  # shared memory is read in words, as nvcc allows
            *("-I", HOST, *sources, "-o", program),
        ]
        subprocess.run(command, check=True)

    return make


@pytest.fixture(scope="session")
def depthwise(built: Callable[..., Path]) -> Path:
    driver = HOST / "dynamic_depthwise_conv2d.cpp"
    source = ROOT / "csrc" / "cuda" / "dynamic_depthwise_conv2d.cu"
    return built("dynamic_depthwise_conv2d", compiler(driver, "-x", "c++", source))


def check(program: Path, case: Case, orders: Sequence[str] = ("reverse", "shuffled")) -> None:
    first, *others = run(program, case, orders)
    for other in others:
        pairs = zip(first, other, strict=True)
        assert all(same_bits(*pair) for pair in pairs), "the order of threads or blocks shows"
    for name, value, true in zip(
        ("output", *GRADIENTS), first, truth(case, arguments(case)), strict=True
    ):
        if value is not None:
            error = (value.double() - true).norm() / true.norm().clamp(min=1e-30)
            assert error <= LIMITS[case.dtype], f"{name}: {error}"


HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
SIDES = [(3, 3), (5, 5), (7, 7)]
EVERY_KIND = [
    Case(batch=2, channels=8 if last else 3, kernel=kernel, dtype=dtype, channels_last=last)
    for last in (False, True)
    for dtype in (BFLOAT, HALF, FLOAT)
    for kernel in SIDES
]
SHAPES = [
    Case(height=1, width=1),
    Case(height=1, width=1, channels=16, channels_last=True),
    Case(height=5, width=7, kernel=(7, 7)),  # smaller than the kernel
    Case(height=14, width=14, channels=20),  # copied by words, sixteen planes in a block
    Case(height=14, width=14, channels=24, kernel=(5, 5), channels_last=True),
    Case(height=33, width=65, channels=2, kernel=(5, 5)),  # several tiles, element by element
    Case(height=33, width=65, channels=2, kernel=(5, 5), dtype=FLOAT),
    Case(height=33, width=65, channels=8, channels_last=True),
    Case(height=18, width=300, channels=1),  # tiles side by side
    Case(height=20, width=250, channels=1, kernel=(7, 7)),  # the widest tile
    Case(height=8, width=16, channels=40, kernel=(7, 7), channels_last=True, batch=2),  # over 48 KB
    Case(height=16, width=40, channels=20, dtype=FLOAT, channels_last=True),
    Case(height=6, width=10, channels=5, channels_last=True),  # no whole channel vector
    Case(height=6, width=10, channels=5, channels_last=True, dtype=FLOAT),
]
SHAPES += [replace(case, multiprocessors=132) for case in SHAPES[3:8]]
RUNS = [
    Case(height=100, width=24, multiprocessors=0, shared_weight=True, batch=2),
    Case(height=70, width=9, kernel=(5, 5), channels=9, multiprocessors=0, channels_last=True),
    Case(height=70, width=24, kernel=(7, 7), channels=8, multiprocessors=0, channels_last=True),
    Case(height=70, width=24, dtype=FLOAT, multiprocessors=0, padding=(2, 2, 0, 1)),
]
PADDINGS = [
    Case(kernel=(5, 5), padding=(0, 0, 0, 0)),
    Case(kernel=(5, 5), padding=(4, 4, 4, 4)),  # more output than input
    Case(kernel=(5, 5), padding=(6, 1, 0, 7), multiprocessors=132),  # outputs that meet no input
    Case(kernel=(7, 7), padding=(6, 1, 0, 7), channels=8, channels_last=True),
    Case(padding=(0, 1, 2, 0), dtype=FLOAT),
    Case(height=3, width=3, kernel=(5, 5), padding=(0, 1, 0, 1), channels=2),  # no output at all
]
SHARING = [
    Case(batch=3, shared_weight=True),
    Case(batch=3, shared_bias=True, dtype=FLOAT, multiprocessors=132),
    Case(batch=3, shared_weight=True, shared_bias=True, channels=8, channels_last=True),
    Case(shared_weight=True, shared_bias=True),  # of one sample: nothing to add
    Case(bias=False),
]
VIEWS = [
    Case(batch=2, slack=(4, 8, 16)),
    Case(batch=2, slack=(3, 8, 17)),
    Case(batch=2, slack=(8, 16, 24), channels=8, channels_last=True),
    Case(batch=2, slack=(1, 0, 0), channels=8, channels_last=True),
    Case(misaligned=True),
    Case(misaligned=True, dtype=FLOAT),
    Case(misaligned=True, channels=8, channels_last=True),
]
EMPTY = [
    Case(batch=0),
    Case(batch=0, shared_weight=True, shared_bias=True),
    Case(channels=0),
]
PLAIN = [
    Case(height=9, width=11, kernel=(1, 1)),
    Case(height=9, width=11, kernel=(2, 2), dtype=FLOAT),
    Case(height=9, width=11, kernel=(4, 4), channels=5, channels_last=True),
    Case(height=9, width=11, kernel=(3, 5), batch=2),
    Case(height=12, width=10, kernel=(9, 9), channels=1),
    Case(height=9, width=11, dilation=(2, 2), dtype=FLOAT, wanted=("input", "bias")),
    Case(height=9, width=11, kernel=(3, 5), dilation=(2, 300), batch=2, shared_weight=True),
]


@pytest.mark.parametrize(
    "case", [*EVERY_KIND, *SHAPES, *RUNS, *PADDINGS, *SHARING, *VIEWS, *EMPTY, *PLAIN], ids=str
)
def test_matches_float64(depthwise: Path, case: Case) -> None:
    check(depthwise, case)


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=2, kernel=(5, 5), height=70, multiprocessors=0),
        Case(batch=2, padding=(2, 0, 1, 2), channels=8, channels_last=True),
        Case(dtype=FLOAT),
        Case(kernel=(2, 2)),
    ],
    ids=str,
)
def test_one_gradient_alone_has_the_same_bits(depthwise: Path, case: Case) -> None:
    (every,) = run(depthwise, case, ["forward"])
    for index, name in enumerate(GRADIENTS, start=1):
        (alone,) = run(depthwise, replace(case, wanted=(name,)), ["forward"])
        assert same_bits(alone[index], every[index])
        assert sum(value is not None for value in alone) == 2


@pytest.fixture(scope="session")
def faults(built: Callable[..., Path]) -> Path:
    return built("faults", compiler(HOST / "faults.cpp"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, "a wrong result"),  # no barrier
        (2, "a wrong result"),  # shared memory that nobody wrote
        (3, "heap-buffer-overflow"),  # past the end of shared memory
        (4, "deadlock"),  # a barrier that part of the block skips
        (5, "wait at two places"),  # a shuffle in both branches
        (6, "deadlock"),  # a thread that leaves before a barrier
        (7, "before its asynchronous copies landed"),
    ],
)
def test_a_fault_is_loud(faults: Path, fault: int, message: str) -> None:
    assert subprocess.run([faults], capture_output=True).returncode == 0
    process = subprocess.run([faults, str(fault)], capture_output=True)
    assert process.returncode != 0
    assert message in process.stderr.decode()
