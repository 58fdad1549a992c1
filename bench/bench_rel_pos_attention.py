"""SAM's attention: a global block (rel_pos_attention), a windowed one (window_rel_pos_attention).

Limits: forward 4·N·n·d FLOP a head for N queries with n keys each, backward 2.5 times that (five
products for two); q, k, v read and the output written once forward, and their gradients backward.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vfmk
from bench.harness import Case, measure

WINDOW = 14
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def bias_of(query: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, side: int) -> Tensor:
    """The materialised bias [B, heads, N, N]."""
    place = torch.arange(side, device=query.device)
    index = place[:, None] - place + side - 1
    grid = query.unflatten(2, (side, side))
    bias_h = torch.einsum("bnhwd,hkd->bnhwk", grid, rel_pos_h[index])
    bias_w = torch.einsum("bnhwd,wkd->bnhwk", grid, rel_pos_w[index])
    return (bias_h[..., :, None] + bias_w[..., None, :]).flatten(4).flatten(2, 3)


def sdpa_with_bias(query, key, value, rel_pos_h, rel_pos_w, *, side):
    bias = bias_of(query, rel_pos_h, rel_pos_w, side)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def sdpa_without_bias(query, key, value, rel_pos_h, rel_pos_w):
    """A floor, not a peer: what it computes is wrong."""
    return F.scaled_dot_product_attention(query, key, value) + 0 * (
        rel_pos_h.sum() + rel_pos_w.sum()
    )


@functools.cache
def compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(query, key, value, rel_pos_h, rel_pos_w, *, side):
    place = torch.arange(side, device=query.device)
    index = place[:, None] - place + side - 1
    grid = query.unflatten(2, (side, side))
    bias_h = torch.einsum("bnhwd,hkd->bnhwk", grid, rel_pos_h[index]).flatten(2, 3)
    bias_w = torch.einsum("bnhwd,wkd->bnhwk", grid, rel_pos_w[index]).flatten(2, 3)

    def biased(score, b, h, q, k):
        return score + bias_h[b, h, q, k // side] + bias_w[b, h, q, k % side]

    return compiled_flex_attention()(query, key, value, score_mod=biased)


def eager_windows(qkv, qkv_bias, rel_pos_h, rel_pos_w, *, heads):
    return vfmk.reference.window_rel_pos_attention(
        qkv, qkv_bias, rel_pos_h, rel_pos_w, WINDOW, heads
    )


def shape_of(device: str, smoke: bool) -> tuple[int, int, int, int, torch.dtype]:
    """Batch, heads, side of the grid, head width, dtype: ViT-B's."""
    if smoke:
        return 1, 2, 16, 16, torch.float32
    return (8, 12, 64, 64, torch.bfloat16) if device == "cuda" else (1, 12, 64, 64, torch.float32)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def bench_global_block(benchmark, device, smoke, direction):
    batch, heads, side, width, dtype = shape_of(device, smoke)
    tokens = side * side
    random = functools.partial(torch.randn, device=device, dtype=dtype)

    def inputs() -> tuple[Tensor, ...]:
        qkv = random(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
        return (
            *qkv.unbind(0),
            0.1 * random(2 * side - 1, width),
            0.1 * random(2 * side - 1, width),
        )

    grid_size = (side, side)
    contenders = {
        "vfmk": functools.partial(vfmk.ops.rel_pos_attention, grid_size=grid_size),
        "eager": functools.partial(vfmk.reference.rel_pos_attention, grid_size=grid_size),
        "sdpa, materialised bias": functools.partial(sdpa_with_bias, side=side),
    }
    if device == "cuda":
        contenders["flex_attention"] = functools.partial(flex, side=side)
    flop = 4 * batch * heads * tokens**2 * width
    moved = 4 * batch * heads * tokens * width * torch.empty((), dtype=dtype).element_size()
    benchmark.group = f"rel_pos_attention {batch}x{heads}x{tokens}x{width} {dtype}"
    measure(
        benchmark,
        Case(
            contenders,
            contenders["eager"],
            inputs,
            direction,
            moved if direction == "forward" else 2 * moved,
            int(flop * {"forward": 1, "backward": 2.5, "both": 3.5}[direction]),
            TOLERANCE[dtype],
            floors={"sdpa, no bias": sdpa_without_bias},
            memory=list(contenders) if direction == "forward" and not smoke else (),
        ),
        rounds=3 if smoke else 30 if device == "cuda" else 7,
    )


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def bench_windowed_block(benchmark, device, smoke, direction):
    batch, heads, side, width, dtype = shape_of(device, smoke)
    random = functools.partial(torch.randn, device=device, dtype=dtype)
    channels = 3 * heads * width

    def inputs() -> tuple[Tensor, ...]:
        tables = (0.1 * random(2 * WINDOW - 1, width) for _ in range(2))
        return (random(batch, side, side, channels), random(channels), *tables)

    ours = functools.partial(vfmk.ops.window_rel_pos_attention, window_size=WINDOW, num_heads=heads)
    eager = functools.partial(eager_windows, heads=heads)
    flop = 4 * batch * heads * side**2 * WINDOW**2 * width
    moved = 4 * batch * heads * side**2 * width * torch.empty((), dtype=dtype).element_size()
    benchmark.group = f"window_rel_pos_attention {batch}x{side}x{side}x{heads}x{width} {dtype}"
    measure(
        benchmark,
        Case(
            {"vfmk": ours, "eager": eager},
            eager,
            inputs,
            direction,
            moved if direction == "forward" else 2 * moved,
            int(flop * {"forward": 1, "backward": 2.5, "both": 3.5}[direction]),
            TOLERANCE[dtype],
        ),
        rounds=3 if smoke else 30,
    )
