import peft
import pytest
import torch

import vfmk
from vfmk import channels
from vfmk.channels import ChannelMap

MAP = ChannelMap(((0, 5), (5, 9), (60, 9)), 64)
IMAGE = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sam():
    return vfmk.load_sam("tiny")


def plain(sam):
    return sam


def adapted(sam):
    model = vfmk.get_adapted_model(sam, vfmk.VFMAdapterConfig(rank=8))
    for parameter in model.adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def with_lora(sam):
    config = peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, sam.image_encoder)
    return sam.eval()


@torch.no_grad()
def embedding(model):
    sam = model.sam if isinstance(model, vfmk.AdaptedSam) else model
    return sam.image_encoder(IMAGE)


@pytest.mark.parametrize("kind", [plain, vfmk.accelerate, adapted, with_lora])
def test_gathers_channels_and_removes_without_a_trace(sam, kind):
    model = kind(sam)
    before, keys = embedding(model), list(model.state_dict())
    assert channels.apply(model, MAP) is model
    torch.testing.assert_close(embedding(model), before[:, MAP.index], rtol=0, atol=1e-6)
    assert list(model.state_dict()) == keys
    channels.remove(model)
    assert torch.equal(embedding(model), before)


def test_on_an_image_encoder(sam):
    before = embedding(sam)
    channels.apply(sam.image_encoder, MAP)
    torch.testing.assert_close(embedding(sam), before[:, MAP.index], rtol=0, atol=1e-6)


def test_gradients_flow_through_the_map(sam):
    image = IMAGE.clone().requires_grad_()
    weights = torch.randn(1, 64, 16, 16)
    (expected,) = torch.autograd.grad(
        (sam.image_encoder(image)[:, MAP.index] * weights).sum(), image
    )
    channels.apply(sam, MAP)
    (gradient,) = torch.autograd.grad((sam.image_encoder(image) * weights).sum(), image)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_refusals(sam):
    with pytest.raises(TypeError, match="apply: map must be a ChannelMap, got list"):
        channels.apply(sam, [(1, 2)])
    with pytest.raises(ValueError, match="the map is for 256 channels, the embedding has 64"):
        channels.apply(sam, ChannelMap(((1, 2),), 256))
    with pytest.raises(TypeError, match="apply: model must be a Sam"):
        channels.apply(torch.nn.Linear(2, 2), MAP)
    with pytest.raises(ValueError, match="remove: the model has no channel map"):
        channels.remove(sam)
    channels.apply(sam, MAP)
    with pytest.raises(ValueError, match="has a channel map already"):
        channels.apply(sam, MAP)
