"""VFM-Adapter: what adapters add to the accelerated frozen encoder, and each piece to an adapter.

In `bench_injection`, encoder without adapters over encoder with them is the share that the base
keeps: 1 / 0.9 is an injection of 11 %. In `bench_pieces`, each piece is over the whole adapter; an
encoder has two adapters a block. Pieces run alone, with what they read still in the cache, so their
sum falls short of the whole.

Limits of one adapter: x and u read and the output written once; its matrix products, 4·N²·r FLOP of
attention, and the convolution's.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vfmk
from bench import encoders
from bench.harness import Case, Function, measure
from vfmk.nn.hypernetwork import Hypernetwork
from vfmk.nn.vfm_adapter import VFMAdapter, VFMAdapterStack, quick_gelu

CONFIGS = {
    "depthwise and global": vfmk.VFMAdapterConfig(dropout=0.0),
    "dense": vfmk.VFMAdapterConfig(conv="dense", global_branch=False, dropout=0.0),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}  # of one adapter


def case_of(device: str, smoke: bool) -> tuple[str, int, int, torch.dtype]:
    """Encoder, batch, image size, dtype."""
    if smoke:
        return "tiny", 1, 64, torch.float32
    return (
        ("ViT-B", 4, 1024, torch.bfloat16) if device == "cuda" else ("ViT-B", 1, 512, torch.float32)
    )


@pytest.mark.parametrize("kind", CONFIGS)
def bench_injection(benchmark, device, smoke, kind):
    name, batch, size, dtype = case_of(device, smoke)
    frozen = encoders.build(name, size, device)
    full = copy.deepcopy(frozen)
    encoders.add_adapters(full, CONFIGS[kind])
    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    ours, without = (encoders.accelerated(encoder).to(dtype) for encoder in (full, frozen))
    benchmark.group = f"{name} encoder with adapters, {kind}, {batch}x{size}x{size} {dtype}"
    measure(
        benchmark,
        Case(
            {"vfmk": partial(encoders.encode, encoder=ours)},
            partial(encoders.encode, encoder=full),
            lambda: (torch.randn_like(images),),
            "forward",
            encoders.bytes_of(ours, images),
            encoders.flop_of(name, batch, size, "forward"),
            encoders.TOLERANCE[dtype],
            {"without adapters": partial(encoders.encode, encoder=without)},
            reference_dtype=torch.float32,
        ),
        rounds=3 if smoke else 7,
    )


def plain(x: Tensor, u: Tensor, *, stack: VFMAdapterStack) -> Tensor:
    """The adapter as one would write it in PyTorch."""
    adapter, queries, hypernetwork = parts_of(stack)
    hidden = quick_gelu(adapter.down(u))
    code = vfmk.reference.attention_pool(adapter.to_tokens(u).flatten(1, 2), queries).sum(1)
    kernels = hypernetwork(code)  # [B, r, k, k], dense [B, r, r, k, k]
    batch, height, width, rank = hidden.shape
    image = hidden.permute(0, 3, 1, 2).reshape(1, batch * rank, height, width)
    groups = batch if adapter.dense else batch * rank
    weight = kernels.reshape(batch * rank, -1, *kernels.shape[-2:])
    mixed = F.conv2d(image, weight, padding=kernels.shape[-1] // 2, groups=groups)
    mixed = mixed.view(batch, rank, height, width).permute(0, 2, 3, 1)
    if adapter.qkv is not None:
        attended = vfmk.reference.adapter_attention(
            hidden.flatten(1, 2), adapter.qkv.weight, adapter.qkv.bias, adapter.num_heads
        )
        mixed = mixed + attended.view_as(mixed)
    return x + adapter.scale * adapter.up(quick_gelu(mixed))


def parts_of(stack: VFMAdapterStack) -> tuple[VFMAdapter, Tensor, Hypernetwork]:
    """The first adapter, the query tokens and its hypernetwork."""
    return stack.layers["0"]["attn"], stack.queries, stack.hypernetworks["attn"]


def pieces_of(stack: VFMAdapterStack, u: Tensor) -> dict[str, Function]:
    """Each step of the adapter, as functions of x and u, on what came out of the step before."""
    adapter, queries, hypernetwork = parts_of(stack)
    with torch.no_grad():
        hidden, tokens = adapter._project(u)
        hidden = quick_gelu(hidden)
        second = adapter.to_tokens[2](F.relu(tokens)).flatten(1, 2)
        code = vfmk.ops.attention_pool(second, queries).sum(1)
        kernels = hypernetwork(code)
    convolve = vfmk.ops.dynamic_conv2d if adapter.dense else vfmk.ops.dynamic_depthwise_conv2d
    pieces = {
        "down and generator's first layer": lambda x, u: adapter._project(u)[0],
        "generator's second layer": lambda x, u: adapter.to_tokens[2](F.relu(tokens)),
        "attention_pool": lambda x, u: vfmk.ops.attention_pool(second, queries).sum(1),
        "hypernetwork": lambda x, u: hypernetwork(code),
        "convolution": lambda x, u: convolve(hidden.permute(0, 3, 1, 2), kernels),
        "activations": lambda x, u: quick_gelu(quick_gelu(hidden)),
        "up and residual": lambda x, u: adapter._add_up(x, hidden),
    }
    if adapter.qkv is not None:
        pieces["adapter_attention"] = lambda x, u: vfmk.ops.adapter_attention(
            hidden.flatten(1, 2), adapter.qkv.weight, adapter.qkv.bias, adapter.num_heads
        )
    return pieces


@pytest.mark.parametrize("kind", CONFIGS)
def bench_pieces(benchmark, device, smoke, kind):
    name, batch, size, dtype = case_of(device, smoke)
    config, width, side = CONFIGS[kind], encoders.ENCODERS[name][0], size // encoders.PATCH
    torch.manual_seed(0)
    full = VFMAdapterStack(width, (0,), config).to(device)
    torch.nn.init.normal_(full.layers["0"]["attn"].up.weight, std=0.02)  # zero at first
    stack = copy.deepcopy(full).to(dtype)
    shape = (batch, side, side, width)

    def inputs() -> tuple[Tensor, Tensor]:
        x, u = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        return x, u

    tokens, rank = side * side, config.rank
    macs = width * (2 * rank + config.token_dim) + config.token_dim**2
    macs += rank * config.kernel_size**2 * (rank if config.conv == "dense" else 1)
    macs += 2 * config.num_queries * config.token_dim
    if config.global_branch:
        macs += 3 * rank**2 + 2 * tokens * rank
    benchmark.group = f"VFM-Adapter, {kind}, {batch}x{side}x{side}x{width} {dtype}"
    measure(
        benchmark,
        Case(
            {
                "vfmk": lambda x, u: stack(x, u, 0, "attn"),
                "plain PyTorch": partial(plain, stack=stack),
            },
            partial(plain, stack=full.double()),
            inputs,
            "forward",
            3 * batch * tokens * width * dtype.itemsize,
            2 * batch * tokens * macs,
            TOLERANCE[dtype],
            pieces_of(stack, inputs()[1]),
        ),
        rounds=3 if smoke else 30,
    )
