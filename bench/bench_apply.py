"""What a channel map costs: the neck's last norm, the neck and the whole encoder, with and without.

"gather after it" is what one would write without vfmk: in the encoder, after the accelerated one;
in the neck and for its norm, after SAM's own. "no map" computes something less, so it is a floor.
Limits: input, output and weights cross memory once; 2 FLOP for each weight and cell, and 8 for each
value in a norm.
"""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import vfmk
from bench import encoders
from bench.encoders import ENCODERS, OUT_CHANNELS, PATCH, build, flop_of
from bench.harness import Case, measure
from vfmk.channels import ChannelMap, apply

CPU_CASES = [("ViT-B", 1, 1024), ("ViT-B", 1, 512)]
CUDA_CASES = [("ViT-B", 8, 1024)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative
# As many pairs as a search gives.
MAP = ChannelMap(tuple((i, OUT_CHANNELS - 1 - i) for i in range(10)), OUT_CHANNELS)
INDEX = MAP.index


def call(x: Tensor, *, module: nn.Module) -> Tensor:
    return module(x)


def call_and_gather(x: Tensor, *, module: nn.Module) -> Tensor:
    return module(x)[:, INDEX.to(x.device)]


def run(
    benchmark,
    group: str,
    plain: nn.Module,
    unmapped: nn.Module,
    mapped: nn.Module,
    inputs: Callable[[], tuple[Tensor]],
    flop: int,
    tolerance: float,
    rounds: int,
    reference_dtype: torch.dtype = torch.float64,
) -> None:
    (example,) = inputs()
    with torch.no_grad():
        moved = example.nbytes + plain(example).nbytes + sum(p.nbytes for p in plain.parameters())
    benchmark.group = f"channel map, {group} {list(example.shape)} {example.dtype}"
    case = Case(
        {
            "vfmk": partial(call, module=mapped),
            "gather after it": partial(call_and_gather, module=plain),
        },
        partial(call_and_gather, module=copy.deepcopy(plain).to(reference_dtype)),
        inputs,
        "forward",
        moved,
        flop,
        tolerance,
        floors={"no map": partial(call, module=unmapped)},
        reference_dtype=reference_dtype,
    )
    measure(benchmark, case, rounds)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cuda = metafunc.config.getoption("device") == "cuda"
    cases = CUDA_CASES if cuda else CPU_CASES
    if metafunc.config.getoption("smoke"):
        cases = [("tiny", 1, 64)]
    metafunc.parametrize(("name", "batch", "size"), cases)


@pytest.mark.parametrize("part", ["last norm", "neck"])
def bench_neck(benchmark, device, smoke, name, batch, size, part):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    width, grid = ENCODERS[name][0], size // PATCH
    flop = 8 * batch * OUT_CHANNELS * grid**2
    shape = (batch, OUT_CHANNELS, grid, grid)
    if part == "neck":
        weights = width * OUT_CHANNELS + 9 * OUT_CHANNELS**2
        flop = 2 * flop + 2 * weights * batch * grid**2
        shape = (batch, width, grid, grid)
    plain = build(name, size, "cpu").to(device, dtype)
    unmapped = vfmk.accelerate(copy.deepcopy(plain))
    mapped = apply(copy.deepcopy(unmapped), MAP)
    parts = [e.neck if part == "neck" else e.neck[-1] for e in (plain, unmapped, mapped)]

    def inputs() -> tuple[Tensor]:
        return (torch.randn(shape, device=device, dtype=dtype),)

    run(benchmark, part, *parts, inputs, flop, TOLERANCE[dtype], 3 if smoke else 30)


def bench_encoder(benchmark, device, smoke, name, batch, size):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    encoder = vfmk.accelerate(build(name, size, device)).to(dtype)

    def inputs() -> tuple[Tensor]:
        return (torch.randn(batch, 3, size, size, device=device, dtype=dtype),)

    run(
        benchmark,
        f"{name} encoder",
        encoder,
        encoder,
        apply(copy.deepcopy(encoder), MAP),
        inputs,
        flop_of(name, batch, size, "forward"),
        encoders.TOLERANCE[dtype],
        3 if smoke else 5 if device == "cpu" else 10,
        reference_dtype=torch.float32,
    )
