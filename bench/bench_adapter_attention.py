"""The global branch of VFM-Adapter: self-attention on a bottleneck of 32 channels.

Limits: forward 6·N·r² + 4·N²·r FLOP a sample, backward 18·N·r² + 10·N²·r (six products with the
weight, five with the scores); input read and output written once forward, and in backward input,
output and its gradient read, the input's gradient written.
"""

import functools

import pytest
import torch
from torch import Tensor

import vfmk
from bench.harness import Case, measure

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


@functools.cache
def compiled_eager():
    return torch.compile(vfmk.reference.adapter_attention, dynamic=False)


def shapes(device: str, smoke: bool) -> list[tuple[int, int, int, int, torch.dtype]]:
    """Batch, tokens, rank, heads, dtype."""
    if smoke:
        return [(1, 96, 16, 1, torch.float32), (2, 50, 8, 2, torch.float32)]
    if device == "cuda":
        return [(8, 4096, 32, 1, torch.bfloat16), (8, 4096, 32, 4, torch.bfloat16)]
    return [(1, 4096, 32, 1, torch.float32), (4, 1024, 32, 1, torch.float32)]


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("index", [0, 1])
def bench_adapter_attention(benchmark, device, smoke, index, direction):
    batch, tokens, rank, heads, dtype = shapes(device, smoke)[index]
    random = functools.partial(torch.randn, device=device, dtype=dtype)

    def inputs() -> tuple[Tensor, ...]:
        weight = random(3 * rank, rank) * rank**-0.5
        return random(batch, tokens, rank), weight, 0.1 * random(3 * rank)

    eager = functools.partial(vfmk.reference.adapter_attention, num_heads=heads)
    contenders = {
        "vfmk": functools.partial(vfmk.ops.adapter_attention, num_heads=heads),
        "linear + sdpa": eager,
    }
    if not smoke:
        contenders["compiled"] = functools.partial(compiled_eager(), num_heads=heads)
    projections, scores = batch * tokens * rank**2, batch * tokens**2 * rank
    flop = {
        "forward": 6 * projections + 4 * scores,
        "backward": 18 * projections + 10 * scores,
        "both": 24 * projections + 14 * scores,
    }
    moved = batch * tokens * rank * torch.empty((), dtype=dtype).element_size()
    benchmark.group = f"adapter_attention {batch}x{tokens}x{rank}, {heads} heads, {dtype}"
    measure(
        benchmark,
        Case(
            contenders,
            eager,
            inputs,
            direction,
            {"forward": 2, "backward": 4, "both": 6}[direction] * moved,
            flop[direction],
            TOLERANCE[dtype],
        ),
        rounds=3 if smoke else 30 if device == "cuda" else 7,
    )
