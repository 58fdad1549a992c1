"""SAM's whole image encoder: its forward pass, and a training step of adapters in it.

Weights are random. Limits: parameters, images and embeddings cross memory once in each direction;
2 FLOP for each weight and token, 4·N·n·C for N queries with n keys each. A step goes back through
the frozen layers for their inputs alone, and 2.5 times through attention. The adapters' own work is
left out.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn

import vfmk
from bench.harness import Case, Function, measure
from vfmk.nn.vfm_adapter import VFMAdapterStack
from vfmk.sam.block import insert_adapters

ENCODERS = {  # width, depth, heads, global blocks
    "tiny": (32, 2, 2, (1,)),
    "ViT-B": (768, 12, 12, (2, 5, 8, 11)),
    "ViT-L": (1024, 24, 16, (5, 11, 17, 23)),
    "ViT-H": (1280, 32, 16, (7, 15, 23, 31)),
}
PATCH, WINDOW, OUT_CHANNELS = 16, 14, 256
CPU_CASES = [("ViT-B", 1, 1024), ("ViT-B", 1, 512)]
CUDA_CASES = [("ViT-B", 8, 1024), ("ViT-L", 8, 1024), ("ViT-H", 8, 1024)]
CUDA_STEPS = [("ViT-B", 4, 1024)]
# Against eager float32: float64 would not fit. Through 12 blocks and more; gradients of adapters.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class UnbiasedAttention(Attention):
    """What attention would cost without relative position; a floor, as its result is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).view(batch, height * width, 3, self.num_heads, -1)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        return self.proj(attended.transpose(1, 2).reshape(x.shape))


def build(name: str, image_size: int, device: str) -> ImageEncoderViT:
    width, depth, heads, global_blocks = ENCODERS[name]
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=image_size,
        patch_size=PATCH,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        out_chans=OUT_CHANNELS,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=WINDOW,
        global_attn_indexes=global_blocks,
    )
    with torch.no_grad():
        for parameter_name, parameter in encoder.named_parameters():
            if "rel_pos" in parameter_name:  # zero at first
                parameter.normal_(std=0.1)
    return encoder.to(device).eval().requires_grad_(False)


def with_adapters(encoder: ImageEncoderViT) -> VFMAdapterStack:
    config = vfmk.VFMAdapterConfig(dropout=0.0)
    width = encoder.patch_embed.proj.out_channels
    adapters = VFMAdapterStack(width, tuple(range(len(encoder.blocks))), config)
    with torch.no_grad():
        for name, parameter in adapters.named_parameters():
            if "up." in name:  # zero at first
                parameter.normal_(std=0.02)
    parameter = next(encoder.parameters())
    encoder.adapters = adapters.to(parameter.device)
    insert_adapters(encoder, encoder.adapters)
    return encoder.adapters


def accelerated(encoder: ImageEncoderViT) -> ImageEncoderViT:
    return vfmk.accelerate(copy.deepcopy(encoder))


def unbiased(encoder: ImageEncoderViT) -> ImageEncoderViT:
    encoder = copy.deepcopy(encoder)
    for block in encoder.blocks:
        block.attn.__class__ = UnbiasedAttention
    return encoder


def compiled(encoder: ImageEncoderViT) -> ImageEncoderViT:
    """Block by block: those alike are compiled once."""
    torch._dynamo.reset()
    encoder = copy.deepcopy(encoder)
    for block in encoder.blocks:
        block.compile(dynamic=False)
    return encoder


def encode(images: Tensor, *, encoder: ImageEncoderViT) -> Tensor:
    return encoder(images)


def encode_with(*parameters: Tensor, encoder: ImageEncoderViT, images: Tensor) -> Tensor:
    """As a function of the adapters' parameters, which a step differentiates in."""
    names = [f"adapters.{name}" for name, _ in encoder.adapters.named_parameters()]
    return torch.func.functional_call(encoder, dict(zip(names, parameters, strict=True)), images)


def flop_of(name: str, batch: int, image_size: int, direction: str) -> int:
    width, depth, _, global_blocks = ENCODERS[name]
    tokens = (image_size // PATCH) ** 2
    keys = len(global_blocks) * tokens + (depth - len(global_blocks)) * WINDOW**2
    attention = 4 * tokens * keys * width
    weights = depth * 12 * width**2 + 3 * PATCH**2 * width
    weights += width * OUT_CHANNELS + 9 * OUT_CHANNELS**2
    linear = 2 * tokens * weights
    once = linear + attention if direction == "forward" else 2 * linear + 3.5 * attention
    return int(batch * once)


def run(benchmark, device: str, smoke: bool, name: str, batch: int, size: int, step: bool) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    full = build(name, size, device)
    if step:
        with_adapters(full)
    encoder = copy.deepcopy(full).to(dtype)
    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)

    def contender(encoder: ImageEncoderViT) -> Function:
        if not step:
            return partial(encode, encoder=encoder)
        own = images.to(next(encoder.parameters()).dtype)
        return partial(encode_with, encoder=encoder, images=own)

    contenders = {"vfmk": contender(accelerated(encoder)), "eager": contender(encoder)}
    if device == "cuda":
        contenders["eager, compiled"] = contender(compiled(encoder))
    floors = {"sdpa, no bias": contender(unbiased(encoder))}
    direction = "both" if step else "forward"
    moved = sum(parameter.nbytes for parameter in encoder.parameters()) + images.nbytes
    moved += batch * OUT_CHANNELS * (size // PATCH) ** 2 * images.element_size()
    kind = "training step" if step else "encoder"
    benchmark.group = f"{name} {kind} {batch}x{size}x{size} {dtype}"
    measure(
        benchmark,
        Case(
            contenders,
            contender(full),
            lambda: tuple(encoder.adapters.parameters()) if step else (torch.randn_like(images),),
            direction,
            2 * moved if step else moved,
            flop_of(name, batch, size, direction),
            TOLERANCE[dtype],
            floors,
            reference_dtype=torch.float32,
            memory=["vfmk"] * step if smoke else [*contenders, *floors],
        ),
        rounds=3 if smoke or device == "cpu" else 10,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cuda = metafunc.config.getoption("device") == "cuda"
    cases = CUDA_CASES if cuda else CPU_CASES
    if cuda and metafunc.function is bench_step:
        cases = CUDA_STEPS
    if metafunc.config.getoption("smoke"):
        cases = [("tiny", 1, 64)]
    metafunc.parametrize(("name", "batch", "size"), cases)


def bench_encoder(benchmark, device, smoke, name, batch, size):
    run(benchmark, device, smoke, name, batch, size, step=False)


def bench_step(benchmark, device, smoke, name, batch, size):
    run(benchmark, device, smoke, name, batch, size, step=True)
