"""SAM's image encoders to measure: random weights, with what may be trained in them."""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn

import vfmk
from vfmk.nn.vfm_adapter import VFMAdapterStack
from vfmk.sam.block import insert_adapters

ENCODERS = {  # width, depth, heads, global blocks
    "tiny": (32, 2, 2, (1,)),
    "ViT-B": (768, 12, 12, (2, 5, 8, 11)),
    "ViT-L": (1024, 24, 16, (5, 11, 17, 23)),
    "ViT-H": (1280, 32, 16, (7, 15, 23, 31)),
}
PATCH, WINDOW, OUT_CHANNELS = 16, 14, 256
RANK = 32
# Of an embedding to eager float32's: float64 would not fit. Through 12 blocks and more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


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


def add_adapters(encoder: ImageEncoderViT, config: vfmk.VFMAdapterConfig | None = None) -> None:
    """VFM-Adapters beside every sub-layer."""
    width = encoder.patch_embed.proj.out_channels
    config = config or vfmk.VFMAdapterConfig(rank=RANK, dropout=0.0)
    adapters = VFMAdapterStack(width, tuple(range(len(encoder.blocks))), config)
    with torch.no_grad():
        for name, parameter in adapters.named_parameters():
            if "up." in name:  # zero at first
                parameter.normal_(std=0.02)
    encoder.adapters = adapters.to(next(encoder.parameters()).device)
    insert_adapters(encoder, encoder.adapters)


def add_lora(encoder: ImageEncoderViT) -> None:
    """peft's LoRA on every block's qkv projection."""
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=r"blocks\.\d+\.attn\.qkv",
        init_lora_weights=False,  # half of it would be zero at first
    )
    inject_adapter_in_model(lora, encoder)


def train_all(encoder: ImageEncoderViT) -> None:
    encoder.requires_grad_(True)


METHODS: dict[str, Callable[[ImageEncoderViT], None]] = {
    "VFM-Adapter": add_adapters,
    "LoRA": add_lora,
    "full fine-tuning": train_all,
}


def trained(encoder: ImageEncoderViT) -> list[nn.Parameter]:
    return [parameter for parameter in encoder.parameters() if parameter.requires_grad]


def accelerated(encoder: ImageEncoderViT) -> ImageEncoderViT:
    return vfmk.accelerate(copy.deepcopy(encoder))


class UnbiasedAttention(Attention):
    """What attention would cost without relative position; a floor, as its result is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).view(batch, height * width, 3, self.num_heads, -1)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        return self.proj(attended.transpose(1, 2).reshape(x.shape))


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


def bytes_of(encoder: ImageEncoderViT, images: Tensor) -> int:
    """Parameters, images and embeddings cross memory once in a forward pass."""
    batch, _, height, width = images.shape
    embeddings = batch * OUT_CHANNELS * (height // PATCH) * (width // PATCH)
    weights = sum(parameter.nbytes for parameter in encoder.parameters())
    return weights + images.nbytes + embeddings * images.element_size()


def flop_of(name: str, batch: int, image_size: int, direction: str) -> int:
    """2 FLOP for each weight and token, 4·N·n·C for N queries with n keys each.

    "step" goes back through the frozen layers for their inputs alone, and 2.5 times through
    attention. The adapters' own work is left out.
    """
    width, depth, _, global_blocks = ENCODERS[name]
    tokens = (image_size // PATCH) ** 2
    keys = len(global_blocks) * tokens + (depth - len(global_blocks)) * WINDOW**2
    attention = 4 * tokens * keys * width
    weights = depth * 12 * width**2 + 3 * PATCH**2 * width
    weights += width * OUT_CHANNELS + 9 * OUT_CHANNELS**2
    linear = 2 * tokens * weights
    once = linear + attention if direction == "forward" else 2 * linear + 3.5 * attention
    return int(batch * once)
