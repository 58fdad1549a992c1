"""The query tokens of VFM-Adapter's parameter generator: M queries pool N tokens.

Limits: forward 4·N·M·D FLOP a sample, backward 10·N·M·D (five products for two); the tokens read
once in each direction, and their gradient written.
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
    return torch.compile(vfmk.reference.attention_pool, dynamic=False)


def shapes(device: str, smoke: bool) -> list[tuple[int, int, int, int, torch.dtype]]:
    """Batch, tokens, width, queries, dtype."""
    if smoke:
        return [(1, 96, 16, 4, torch.float32), (2, 50, 8, 3, torch.float32)]
    if device == "cuda":
        return [(8, 4096, 64, 16, torch.bfloat16), (8, 4096, 64, 64, torch.bfloat16)]
    return [(1, 4096, 64, 16, torch.float32), (1, 4096, 64, 64, torch.float32)]


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("index", [0, 1])
def bench_attention_pool(benchmark, device, smoke, index, direction):
    batch, tokens, width, queries, dtype = shapes(device, smoke)[index]
    random = functools.partial(torch.randn, device=device, dtype=dtype)

    def inputs() -> tuple[Tensor, ...]:
        return random(batch, tokens, width), random(queries, width) * width**-0.5

    eager = vfmk.reference.attention_pool
    contenders = {"vfmk": vfmk.ops.attention_pool, "matmul, softmax, matmul": eager}
    if not smoke:
        contenders["compiled"] = compiled_eager()
    moved = batch * tokens * width * torch.empty((), dtype=dtype).element_size()
    product = 2 * batch * tokens * queries * width
    benchmark.group = f"attention_pool {batch}x{tokens}x{width}, {queries} queries, {dtype}"
    measure(
        benchmark,
        Case(
            contenders,
            eager,
            inputs,
            direction,
            {"forward": 1, "backward": 2, "both": 3}[direction] * moved,
            {"forward": 2, "backward": 5, "both": 7}[direction] * product,
            TOLERANCE[dtype],
        ),
        rounds=3 if smoke else 30,
    )
