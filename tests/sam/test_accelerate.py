"""The fused operators in the real `segment_anything` classes."""

import copy

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.image_encoder import Attention, Block
from torch import nn
from torch.utils.checkpoint import checkpoint

import vfmk
from tests.operator_checks import relative_error
from vfmk.sam.block import VfmkBlock, fuse_attention
from vfmk.sam.load import build_tiny_sam
from vfmk.sam.neck import FusedLayerNorm2d

# fp32: what products of some hundred terms and an exponential lose; the limit for SAM.
FP32_LIMIT = 2e-5


@pytest.fixture
def sam():
    return with_tables(build_tiny_sam().eval())


def with_tables(model: nn.Module, seed: int = 0) -> nn.Module:
    """Relative positions start at zero in SAM, where they would hide what they do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def random_images(*size: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, and the gradients of the input and of every parameter."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    output = module(x)
    generator = torch.Generator().manual_seed(2)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    output.backward(cotangent.to(output.dtype))
    results = {"output": output.detach(), "input": x.grad}
    return results | {name: parameter.grad for name, parameter in module.named_parameters()}


def fused(block: Block) -> Block:
    """A copy of the block as `accelerate` makes it."""
    encoder = ImageEncoderViT(img_size=16, embed_dim=8, depth=0, num_heads=1)
    encoder.blocks = nn.ModuleList([copy.deepcopy(block)])
    fuse_attention(encoder)
    return encoder.blocks[0]


BLOCKS = {  # window, grid it was made for, grid it is given
    "global": (0, (10, 12), (10, 12)),
    "global, another grid": (0, (8, 8), (5, 11)),
    "windows": (7, (14, 14), (14, 14)),
    "windows, padded": (7, (16, 16), (16, 9)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_block_equals_segment_anything(name, dtype):
    """Output and every gradient, against float64; half precision within 1.5 of eager's error."""
    window, made_for, grid = BLOCKS[name]
    torch.manual_seed(0)
    eager = with_tables(
        Block(48, 3, use_rel_pos=True, window_size=window, input_size=made_for).to(dtype)
    )
    x = random_images(2, *grid, 48, dtype=dtype)
    truth = gradients(copy.deepcopy(eager).double(), x.double())
    theirs, ours = gradients(eager, x), gradients(fused(eager), x)
    assert ours.keys() == truth.keys()
    for key, true in truth.items():
        eager_error = relative_error(theirs[key], true)
        limit = FP32_LIMIT if dtype == torch.float32 else 1.5 * eager_error
        assert relative_error(ours[key], true) <= limit, key


def test_nothing_but_the_computation_changes(sam):
    block = sam.image_encoder.blocks[0]
    seen = []
    block.attn.register_forward_hook(lambda *args: seen.append(1))
    before = copy.deepcopy(sam.state_dict())
    training = [module.training for module in sam.modules()]
    assert vfmk.accelerate(sam) is sam
    assert list(sam.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[key]) for key, tensor in sam.state_dict().items())
    assert [module.training for module in sam.modules()] == training
    sam.image_encoder(random_images(1, 3, 128, 128))
    assert seen == [1]
    assert [isinstance(part, FusedLayerNorm2d) for part in sam.image_encoder.neck] == [0, 1, 0, 1]
    assert isinstance(block, VfmkBlock)
    assert isinstance(block, Block)


def test_restore_gives_the_same_bits(sam):
    images = random_images(2, 3, 128, 128)
    before = sam.image_encoder(images)
    vfmk.accelerate(sam)
    assert relative_error(sam.image_encoder(images), before) < FP32_LIMIT
    vfmk.restore(sam)
    assert torch.equal(sam.image_encoder(images), before)
    assert type(sam.image_encoder) is ImageEncoderViT
    assert {type(block) for block in sam.image_encoder.blocks} == {Block}
    assert {type(block.attn) for block in sam.image_encoder.blocks} == {Attention}
    assert {type(sam.image_encoder.neck[i]) for i in (1, 3)} == {LayerNorm2d}


def test_together_with_adapters(sam):
    """In any order of putting in and taking out."""
    images = random_images(1, 3, 128, 128)
    before = sam.image_encoder(images)
    adapted = vfmk.get_adapted_model(vfmk.accelerate(sam), vfmk.VFMAdapterConfig(rank=8))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.add_(0.05)
    accelerated = sam.image_encoder(images)
    vfmk.restore(adapted)
    assert relative_error(accelerated, sam.image_encoder(images)) < FP32_LIMIT
    assert relative_error(accelerated, before) > 1e-3
    vfmk.accelerate(adapted)
    vfmk.restore(adapted.unload())
    assert torch.equal(sam.image_encoder(images), before)
    assert {type(block) for block in sam.image_encoder.blocks} == {Block}


@pytest.mark.parametrize("size", [(192, 192), (64, 160), (128, 40)])
def test_other_image_sizes(sam, size):
    """As segment_anything computes it, given position embeddings of that size."""
    images = random_images(1, 3, *size)
    resized = copy.deepcopy(sam.image_encoder)
    grid = (size[0] // 8, size[1] // 8)
    pos_embed = resized.pos_embed.permute(0, 3, 1, 2)
    pos_embed = nn.functional.interpolate(pos_embed, grid, mode="bicubic").permute(0, 2, 3, 1)
    resized.pos_embed = nn.Parameter(pos_embed)
    vfmk.accelerate(sam)
    assert relative_error(sam.image_encoder(images), resized(images)) < FP32_LIMIT


def test_an_image_that_patches_do_not_divide(sam):
    with pytest.raises(ValueError, match="accelerate: the image is 100×128; patches of 8×8"):
        vfmk.accelerate(sam).image_encoder(random_images(1, 3, 100, 128))


def test_wrapped_qkv(sam):
    """A layer around qkv, as peft puts LoRA there, keeps its part in the padding too."""

    class Wrapped(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.shift = base, nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x) + self.shift

    images = random_images(1, 3, 128, 128)
    attention = sam.image_encoder.blocks[0].attn
    attention.qkv = Wrapped(attention.qkv)
    before = sam.image_encoder(images)
    vfmk.accelerate(sam)
    assert relative_error(sam.image_encoder(images), before) < FP32_LIMIT
    sam.image_encoder(images).sum().backward()
    assert attention.qkv.shift.grad is not None


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
def test_hooks_on_qkv(sam, register):
    """Values that a hook changes are changed in the padding too."""
    images = random_images(1, 3, 128, 128)
    for block in sam.image_encoder.blocks:
        getattr(block.attn.qkv, register)(
            lambda module, inputs, *output: (output or inputs)[0] * 0.5 + 0.25
        )
    before = sam.image_encoder(images)
    vfmk.accelerate(sam)
    assert relative_error(sam.image_encoder(images), before) < FP32_LIMIT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(sam, dtype):
    """A whole Sam, cast: no farther from float64 than 1.5 times SAM's own way, with gradients."""
    images = random_images(1, 3, 128, 128, dtype=dtype)
    sam.to(dtype)
    truth = gradients(copy.deepcopy(sam.image_encoder).double(), images.double())
    theirs = gradients(sam.image_encoder, images)
    ours = gradients(vfmk.accelerate(sam).image_encoder, images)
    assert ours["output"].dtype == dtype

    def error(results: dict[str, torch.Tensor]) -> float:
        return max(relative_error(results[name], true) for name, true in truth.items())

    assert relative_error(ours["output"], truth["output"]) <= 1.5 * relative_error(
        theirs["output"], truth["output"]
    )
    assert error(ours) <= 1.5 * error(theirs)


def test_compiled_by_inductor():
    """Code that relies on the strides that the operators promise."""
    torch.manual_seed(0)
    eager = with_tables(Block(48, 3, use_rel_pos=True, window_size=7, input_size=(16, 9)))
    block, x = fused(eager), random_images(2, 16, 9, 48)
    expected = gradients(block, x)
    compiled = gradients(torch.compile(block, fullgraph=True), x)
    compiled = {name.removeprefix("_orig_mod."): tensor for name, tensor in compiled.items()}
    assert compiled.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_error(compiled[name], tensor) <= FP32_LIMIT, name


def test_autocast_compile_and_checkpointing(sam):
    images = random_images(1, 3, 128, 128)
    expected = vfmk.accelerate(sam).image_encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(sam.image_encoder(images), expected) < 0.05
    compiled = torch.compile(sam.image_encoder, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(images), expected) < FP32_LIMIT
    block, x = sam.image_encoder.blocks[1], random_images(1, 16, 16, 128)
    plain = gradients(block, x)
    block.zero_grad()
    x = x.requires_grad_()
    output = checkpoint(block, x, use_reentrant=False)
    generator = torch.Generator().manual_seed(2)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    output.backward(cotangent.float())
    assert relative_error(x.grad, plain["input"]) < FP32_LIMIT


class ForeignEncoder(ImageEncoderViT):
    pass


class ForeignBlock(Block):
    pass


class ForeignAttention(Attention):
    pass


@pytest.mark.parametrize("foreign", [ForeignEncoder, ForeignBlock, ForeignAttention])
def test_keeps_foreign_code(sam, foreign):
    """A subclass may compute something else, and would be a plain SAM class after `restore`."""
    encoder = sam.image_encoder
    module, named = {
        ForeignEncoder: (encoder, "the encoder is ForeignEncoder"),
        ForeignBlock: (encoder.blocks[1], "block 1 is ForeignBlock"),
        ForeignAttention: (encoder.blocks[2].attn, "block 2's attn is ForeignAttention"),
    }[foreign]
    module.__class__ = foreign
    with pytest.raises(ValueError, match=f"^accelerate: not SAM's own classes: {named}$"):
        vfmk.accelerate(sam)
    assert type(module) is foreign
    assert {type(m) for m in (encoder, *encoder.blocks)} <= {ImageEncoderViT, Block, foreign}


def test_refuses_by_name(sam):
    with pytest.raises(TypeError, match=r"accelerate: model must be a Sam, .* got Linear"):
        vfmk.accelerate(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="restore: the model is not accelerated"):
        vfmk.restore(sam)
    vfmk.accelerate(sam)
    with pytest.raises(ValueError, match="accelerate: the model is accelerated already"):
        vfmk.accelerate(sam.image_encoder)
    plain = ImageEncoderViT(img_size=32, embed_dim=8, depth=2, num_heads=2)
    with pytest.raises(ValueError, match=r"blocks \[0, 1\] have no relative position"):
        vfmk.accelerate(plain)
