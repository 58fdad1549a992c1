"""SAM's attention: a global block (rel_pos_attention), a windowed one (window_rel_pos_attention).

The peer is what segment_anything runs: `Attention.forward` from qkv for the global block, and for
the windowed one its whole way from x to the projected output, which pads x to whole windows and so
computes qkv and proj of the padding too. Ours has both products on real tokens alone.

Limits: forward 4·N·n·d FLOP a head for N queries with n keys each, backward 2.5 times that (five
products for two); in the windowed block 8·N·C² more for qkv and proj, backward twice that. What
must move: the inputs and the output forward, and their gradients backward.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import (
    Attention,
    window_partition,
    window_unpartition,
)
from torch import Tensor

import vfmk
from bench.harness import Case, Function, measure

WINDOW = 14
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def itself(x: Tensor) -> Tensor:
    return x


# From qkv [B, H, W, 3·C] and both tables to the heads' outputs side by side [B, H, W, C].


def vfmk_attention(qkv, rel_pos_h, rel_pos_w, *, heads, attention=vfmk.ops.rel_pos_attention):
    query, key, value = split(qkv, heads)
    return merged(attention(query, key, value, rel_pos_h, rel_pos_w, qkv.shape[1:3]), qkv)


reference = functools.partial(vfmk_attention, attention=vfmk.reference.rel_pos_attention)


def segment_anything_attention(qkv, rel_pos_h, rel_pos_w, *, heads):
    channels = qkv.shape[-1] // 3
    module = SimpleNamespace(
        qkv=itself,
        proj=itself,
        num_heads=heads,
        scale=(channels // heads) ** -0.5,
        use_rel_pos=True,
        rel_pos_h=rel_pos_h,
        rel_pos_w=rel_pos_w,
    )
    return Attention.forward(module, qkv)


def sdpa_with_bias(qkv, rel_pos_h, rel_pos_w, *, heads):
    query, key, value = split(qkv, heads)
    bias_h, bias_w = biases(query, rel_pos_h, rel_pos_w, qkv.shape[1:3])
    bias = (bias_h[..., :, None] + bias_w[..., None, :]).flatten(3)
    return merged(F.scaled_dot_product_attention(query, key, value, attn_mask=bias), qkv)


def sdpa_without_bias(qkv, rel_pos_h, rel_pos_w, *, heads):
    """A floor, not a peer: what it computes is wrong."""
    unused = 0 * (rel_pos_h.sum() + rel_pos_w.sum())
    return merged(F.scaled_dot_product_attention(*split(qkv, heads)), qkv) + unused


def flex(qkv, rel_pos_h, rel_pos_w, *, heads):
    query, key, value = split(qkv, heads)
    columns = qkv.shape[2]
    bias_h, bias_w = biases(query, rel_pos_h, rel_pos_w, qkv.shape[1:3])

    def biased(score, b, h, q, k):
        return score + bias_h[b, h, q, k // columns] + bias_w[b, h, q, k % columns]

    return merged(compiled_flex_attention()(query, key, value, score_mod=biased), qkv)


@functools.cache
def compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Query, key, value [B, heads, N, d], views."""
    return qkv.flatten(1, 2).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def merged(attended: Tensor, qkv: Tensor) -> Tensor:
    return attended.transpose(1, 2).reshape(*qkv.shape[:3], -1)


def biases(query: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid_size) -> list[Tensor]:
    """What each query adds for each row of keys [B, heads, N, H], and column [B, heads, N, W]."""
    grid = query.unflatten(2, grid_size)
    added = []
    for equation, table, size in (
        ("bnhwd,hkd->bnhwk", rel_pos_h, grid_size[0]),
        ("bnhwd,wkd->bnhwk", rel_pos_w, grid_size[1]),
    ):
        place = torch.arange(size, device=query.device)
        index = place[:, None] - place + size - 1
        added.append(torch.einsum(equation, grid, table[index]).flatten(2, 3))
    return added


# From x [B, H, W, C] to the projected output [B, H, W, C], in windows.


def vfmk_windows(
    x, qkv_weight, qkv_bias, proj_weight, proj_bias, rel_pos_h, rel_pos_w, *, heads,
):  # fmt: skip
    qkv = F.linear(x, qkv_weight, qkv_bias)
    attended = vfmk.ops.window_rel_pos_attention(qkv, qkv_bias, rel_pos_h, rel_pos_w, WINDOW, heads)
    return F.linear(attended, proj_weight, proj_bias)


def padded_windows(
    x, qkv_weight, qkv_bias, proj_weight, proj_bias, rel_pos_h, rel_pos_w, *, heads, attention,
):  # fmt: skip
    """SAM's way, with `attention` from qkv in each window."""
    windows, padded_size = window_partition(x, WINDOW)
    qkv = F.linear(windows, qkv_weight, qkv_bias)
    attended = attention(qkv, rel_pos_h, rel_pos_w, heads=heads)
    projected = F.linear(attended, proj_weight, proj_bias)
    return window_unpartition(projected, WINDOW, padded_size, x.shape[1:3])


def attentions_of_torch(device: str) -> dict[str, Function]:
    peers = {
        "segment_anything": segment_anything_attention,
        "sdpa, materialised bias": sdpa_with_bias,
    }
    return peers | ({"flex_attention": flex} if device == "cuda" else {})


def shape_of(device: str, smoke: bool) -> tuple[int, int, int, int, torch.dtype]:
    """Batch, heads, side of the grid, head width, dtype: ViT-B's."""
    if smoke:
        return 1, 2, 16, 16, torch.float32
    return (8, 12, 64, 64, torch.bfloat16) if device == "cuda" else (1, 12, 64, 64, torch.float32)


def rounds_of(device: str, smoke: bool) -> int:
    return 3 if smoke else 30 if device == "cuda" else 7


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def bench_global_block(benchmark, device, smoke, direction):
    batch, heads, side, width, dtype = shape_of(device, smoke)
    tokens, channels = side * side, heads * width
    random = functools.partial(torch.randn, device=device, dtype=dtype)

    def inputs() -> tuple[Tensor, ...]:
        tables = (0.1 * random(2 * side - 1, width) for _ in range(2))
        return (random(batch, side, side, 3 * channels), *tables)

    functions = {"vfmk": vfmk_attention} | attentions_of_torch(device)
    contenders = {name: functools.partial(f, heads=heads) for name, f in functions.items()}
    flop = 4 * batch * heads * tokens**2 * width
    moved = 4 * batch * tokens * channels * dtype.itemsize
    benchmark.group = f"rel_pos_attention {batch}x{heads}x{tokens}x{width} {dtype}"
    measure(
        benchmark,
        Case(
            contenders,
            functools.partial(reference, heads=heads),
            inputs,
            direction,
            moved if direction == "forward" else 2 * moved,
            int(flop * {"forward": 1, "backward": 2.5, "both": 3.5}[direction]),
            TOLERANCE[dtype],
            floors={"sdpa, no bias": functools.partial(sdpa_without_bias, heads=heads)},
            memory=list(contenders) if direction != "backward" and not smoke else (),
        ),
        rounds=rounds_of(device, smoke),
    )


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def bench_windowed_block(benchmark, device, smoke, direction):
    batch, heads, side, width, dtype = shape_of(device, smoke)
    tokens, channels = side * side, heads * width
    random = functools.partial(torch.randn, device=device, dtype=dtype)

    def inputs() -> tuple[Tensor, ...]:
        return (
            random(batch, side, side, channels),
            channels**-0.5 * random(3 * channels, channels),
            0.1 * random(3 * channels),
            channels**-0.5 * random(channels, channels),
            0.1 * random(channels),
            *(0.1 * random(2 * WINDOW - 1, width) for _ in range(2)),
        )

    contenders: dict[str, Function] = {"vfmk": functools.partial(vfmk_windows, heads=heads)}
    for name, attention in attentions_of_torch(device).items():
        contenders[name] = functools.partial(padded_windows, heads=heads, attention=attention)
    floor = functools.partial(padded_windows, heads=heads, attention=sdpa_without_bias)
    attention_flop = 4 * batch * tokens * WINDOW**2 * channels
    product_flop = 8 * batch * tokens * channels**2
    factors = {"forward": (1, 1), "backward": (2.5, 2), "both": (3.5, 3)}[direction]
    moved = (2 * batch * tokens * channels + 4 * channels**2) * dtype.itemsize
    shape = f"{batch}x{side}x{side}x{heads}x{width}"
    benchmark.group = f"window_rel_pos_attention with qkv and proj {shape} {dtype}"
    measure(
        benchmark,
        Case(
            contenders,
            functools.partial(padded_windows, heads=heads, attention=reference),
            inputs,
            direction,
            moved if direction == "forward" else 2 * moved,
            int(factors[0] * attention_flop + factors[1] * product_flop),
            TOLERANCE[dtype],
            floors={"sdpa, no bias": floor},
            memory=list(contenders) if direction != "backward" and not smoke else (),
        ),
        rounds=rounds_of(device, smoke),
    )
