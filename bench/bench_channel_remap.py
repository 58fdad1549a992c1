"""channel_remap against what PyTorch users write today.

Every contender gives its result in the layout of its input, as what follows wants it: PyTorch's
indexing turns channels-last into NCHW, so a copy back is its part. Limits for N elements of s
bytes: forward 2Ns bytes; backward 2Ns, with the scale's gradient 3Ns.
"""

import functools

import pytest
import torch
from torch import Tensor

import vfmk
from bench.harness import Case, measure

CPU_SIZES = [(1, 64, 8, 8), (1, 256, 16, 16), (1, 256, 32, 32), (1, 256, 64, 64), (8, 256, 64, 64)]
CUDA_SIZES = [(8, 256, 64, 64), (8, 256, 256, 256)]
LAYOUTS = {"nchw": 1, "channels_last": 1, "tokens": 3}  # the dimension of the channels
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def channel_map(channels: int, kind: str) -> Tensor:
    """A search's result (ten channels overwritten), or any channel for each."""
    random = torch.Generator().manual_seed(0)
    if kind == "random":
        return torch.randint(channels, (channels,), generator=random)
    index = torch.arange(channels)
    index[torch.randperm(channels, generator=random)[:10]] = torch.randint(
        channels, (min(10, channels),), generator=random
    )
    return index


def on_backend(name: str, run):
    def run_there(*args: Tensor) -> Tensor:
        with vfmk.use_backend(name):
            return run(*args)

    return run_there


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cuda = metafunc.config.getoption("device") == "cuda"
    smoke = metafunc.config.getoption("smoke")
    sizes = [(2, 32, 9, 10)] if smoke else CUDA_SIZES if cuda else CPU_SIZES
    metafunc.parametrize("size", sizes, ids=lambda size: "x".join(map(str, size)))
    metafunc.parametrize("dtype", [torch.bfloat16] if cuda else [torch.float32], ids=str)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["pairs", "random"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
def bench_channel_remap(benchmark, device, smoke, size, dtype, layout, kind, direction, scaled):
    dim = LAYOUTS[layout]
    channels = size[1]
    index = channel_map(channels, kind).to(device)
    shape = [1] * 4
    shape[dim] = channels

    def inputs() -> tuple[Tensor, ...]:
        random = functools.partial(torch.randn, device=device, dtype=dtype)
        input = random(size)
        if layout == "channels_last":
            input = input.to(memory_format=torch.channels_last)
        elif layout == "tokens":
            input = random(size[0], *size[2:], channels)
        return (input, random(channels)) if scaled else (input,)

    def times(output: Tensor, scale: Tensor | None) -> Tensor:
        scaled = output if scale is None else output * scale.view(shape)
        if layout != "channels_last":
            return scaled
        return scaled.contiguous(memory_format=torch.channels_last)

    def ours(input: Tensor, scale: Tensor | None = None) -> Tensor:
        return vfmk.ops.channel_remap(input, index, scale, dim=dim)

    def index_select(input: Tensor, scale: Tensor | None = None) -> Tensor:
        return times(input.index_select(dim, index), scale)

    def advanced_indexing(input: Tensor, scale: Tensor | None = None) -> Tensor:
        return times(input[(slice(None),) * dim + (index,)], scale)

    def gather(input: Tensor, scale: Tensor | None = None) -> Tensor:
        return times(input.gather(dim, index.view(shape).expand(input.shape)), scale)

    contenders = {"vfmk": ours}
    if device == "cuda":
        contenders["vfmk triton"] = on_backend("triton", ours)
    contenders |= {
        "index_select": index_select,
        "advanced indexing": advanced_indexing,
        "gather": gather,
    }
    if not smoke:
        torch._dynamo.reset()  # else a limit on recompilation makes it eager in the end
        contenders["index_select compiled"] = torch.compile(index_select, dynamic=False)
    elements = torch.Size(size).numel()
    moved = elements * torch.empty((), dtype=dtype).element_size()
    passes = 3 if scaled and direction == "backward" else 2
    case = Case(
        contenders,
        lambda input, *scale: vfmk.reference.channel_remap(input, index, *scale, dim=dim),
        inputs,
        direction,
        passes * moved,
        elements * (1 if direction == "forward" else 3),
        TOLERANCE[dtype],
    )
    scale = "" if scaled else " unscaled"
    benchmark.group = f"channel_remap {size} {layout} {kind}{scale} {dtype}"
    measure(benchmark, case, rounds=3 if smoke else 30)
