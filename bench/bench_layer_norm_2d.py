"""layer_norm_2d, plain and with a channel map, against LayerNorm2d as segment_anything writes it.

"layer_norm" is PyTorch's own on the channels-last permutation: in NCHW it copies on the way in and
out. Every peer gives its result in the layout of its input, and with a map gathers after the norm.
Limits for N elements of s bytes: forward 2Ns bytes and 8 FLOP an element, backward 3Ns and 14.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vfmk
from bench.harness import Case, measure

CPU_SIZES = [(1, 256, 64, 64), (8, 256, 64, 64)]
CUDA_SIZES = [(8, 256, 64, 64)]
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
EPS = 1e-6
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def layer_norm_2d(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As segment_anything's LayerNorm2d."""
    mean = input.mean(1, keepdim=True)
    variance = (input - mean).pow(2).mean(1, keepdim=True)
    normalized = (input - mean) / torch.sqrt(variance + EPS)
    return weight[:, None, None] * normalized + bias[:, None, None]


def layer_norm(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    tokens = input.permute(0, 2, 3, 1)
    return F.layer_norm(tokens, weight.shape, weight, bias, EPS).permute(0, 3, 1, 2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cuda = metafunc.config.getoption("device") == "cuda"
    smoke = metafunc.config.getoption("smoke")
    sizes = [(2, 32, 9, 10)] if smoke else CUDA_SIZES if cuda else CPU_SIZES
    metafunc.parametrize("size", sizes, ids=lambda size: "x".join(map(str, size)))
    metafunc.parametrize("dtype", [torch.bfloat16] if cuda else [torch.float32], ids=str)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("mapped", [False, True], ids=["plain", "mapped"])
@pytest.mark.parametrize("layout", LAYOUTS)
def bench_layer_norm_2d(benchmark, device, smoke, size, dtype, layout, mapped, direction):
    channels, memory_format = size[1], LAYOUTS[layout]
    index = None
    if mapped:  # as many channels as a search overwrites
        index = torch.arange(channels, device=device)
        index[:10] = channels - 1 - index[:10]

    def inputs() -> tuple[Tensor, ...]:
        random = functools.partial(torch.randn, device=device, dtype=dtype)
        input = random(size).contiguous(memory_format=memory_format)
        return input, random(channels), random(channels)

    def then_gathered(norm):
        def run(*args: Tensor) -> Tensor:
            output = norm(*args)
            if index is not None:
                output = output.index_select(1, index)
            return output.contiguous(memory_format=memory_format)

        return run

    eager = then_gathered(layer_norm_2d)
    contenders = {
        "vfmk": lambda *args: vfmk.ops.layer_norm_2d(*args, index, eps=EPS),
        "LayerNorm2d": eager,
        "layer_norm": then_gathered(layer_norm),
    }
    if not smoke:
        torch._dynamo.reset()  # else a limit on recompilation makes it eager in the end
        contenders["LayerNorm2d compiled"] = torch.compile(eager, dynamic=False)
    elements = torch.Size(size).numel()
    moved = elements * torch.empty((), dtype=dtype).element_size()
    case = Case(
        contenders,
        lambda *args: vfmk.reference.layer_norm_2d(*args, index, eps=EPS),
        inputs,
        direction,
        (2 if direction == "forward" else 3) * moved,
        elements * (8 if direction == "forward" else 14),
        TOLERANCE[dtype],
    )
    map = " mapped" if mapped else ""
    benchmark.group = f"layer_norm_2d {size} {layout}{map} {dtype}"
    measure(benchmark, case, rounds=3 if smoke else 30)
