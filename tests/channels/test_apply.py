import copy

import peft
import pytest
import torch

import vfmk
from tests.operator_checks import relative_error
from vfmk import channels
from vfmk.channels import ChannelMap
from vfmk.sam.neck import FusedLayerNorm2d, MappedLayerNorm2d

LORA = peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)
LORA_AND_NECK = peft.LoraConfig(target_modules=["qkv"], modules_to_save=["neck"])
MAP = ChannelMap(((0, 5), (5, 9), (60, 9)), 64)
# A mapped norm is one operator, which rounds otherwise than SAM's.
ROUNDING = 1e-6
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
    peft.inject_adapter_in_model(LORA, sam.image_encoder)
    return sam.eval()


def in_a_peft_model(sam):
    return vfmk.accelerate(peft.get_peft_model(sam, LORA)).eval()


def with_pefts_neck(sam):
    return vary_pefts(peft.get_peft_model(sam, LORA_AND_NECK)).eval()


def with_pefts_norm(sam):
    lora = peft.LoraConfig(target_modules=["qkv"], modules_to_save=["neck.3"])
    peft.inject_adapter_in_model(lora, sam)
    return vary_pefts(sam).eval()


def vary_pefts(model):
    """Its copies, away from the originals."""
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1
    return model


def lora_beneath_adapters(sam):
    return adapted(with_lora(sam))


@torch.no_grad()
def embedding(model):
    sam = model.sam if isinstance(model, vfmk.AdaptedSam) else model
    return sam.image_encoder(IMAGE)


def has_map(model) -> bool:
    """Anywhere, in force or not."""
    return any(isinstance(module, MappedLayerNorm2d) for module in model.modules())


def has_fused_norm(model) -> bool:
    return any(isinstance(module, FusedLayerNorm2d) for module in model.modules())


def is_gathered(after, before) -> bool:
    return relative_error(after, before[:, MAP.index]) <= ROUNDING


@pytest.mark.parametrize(
    "kind",
    [
        plain,
        vfmk.accelerate,
        adapted,
        with_lora,
        in_a_peft_model,
        with_pefts_neck,
        with_pefts_norm,
        lora_beneath_adapters,
    ],
)
def test_gathers_channels_and_removes_without_a_trace(sam, kind):
    model = kind(sam)
    before, keys = embedding(model), list(model.state_dict())
    fused = has_fused_norm(model)
    assert channels.apply(model, MAP) is model
    assert is_gathered(embedding(model), before)
    assert torch.equal(embedding(model), before[:, MAP.index]) or not fused
    assert list(model.state_dict()) == keys
    channels.remove(model)
    assert torch.equal(embedding(model), before)
    assert not has_map(model)
    assert has_fused_norm(model) == fused


@pytest.fixture
def with_necks(sam):
    """Adapters that have no neck of their own, a neck, its last norm, its first convolution."""
    model = vfmk.get_adapted_model(sam, vfmk.VFMAdapterConfig(rank=4), "plain")
    for name, module in (("neck", "neck"), ("norm", "neck.3"), ("convolution", "neck.0")):
        add_adapter(model, name, module)
    return model.eval()


def add_adapter(model, name, module):
    """With weights away from where they start."""
    model.add_adapter(name, vfmk.VFMAdapterConfig(rank=4, modules_to_save=(module,)))
    generator = torch.Generator().manual_seed(len(model.adapters))
    for part in (model.adapters[name], model.modules_to_save[name]):
        for parameter in part.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)


def embeddings(model) -> dict:
    """Of the base and of every adapter, by name."""
    active, found = model.active_adapter, {}
    for name in [*model.adapters, active]:
        model.set_adapter(name)
        found[name] = embedding(model)
    with model.disable_adapter():
        found["base"] = embedding(model)
    return found


@pytest.mark.parametrize("part", [lambda m: m, lambda m: m.sam, lambda m: m.sam.image_encoder])
@pytest.mark.parametrize("active", ["plain", "neck", "norm"])
def test_a_map_holds_whichever_adapter_is_active(with_necks, active, part):
    model = with_necks
    before, keys = embeddings(model), list(model.state_dict())
    model.set_adapter(active)
    channels.apply(part(model), MAP)
    add_adapter(model, "later", "neck")
    model.delete_adapter("convolution")
    mapped = embeddings(model)
    for name in ("base", "plain", "neck", "norm"):
        assert is_gathered(mapped[name], before[name])
    model.delete_adapter("later")
    gone = ("convolution.", "base_modules.image_encoder/neck/0.")
    assert list(model.state_dict()) == [k for k in keys if not any(part in k for part in gone)]

    add_adapter(model, "idle", "neck")
    with model.disable_adapter():
        channels.remove(part(model))
    assert not has_map(model)
    model.delete_adapter("idle")
    after = embeddings(model)
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_a_map_is_not_saved_with_an_adapter(with_necks, tmp_path):
    base = vfmk.load_sam("tiny")
    before = embeddings(with_necks)["neck"]
    channels.apply(with_necks, MAP).set_adapter("neck")
    with_necks.save_pretrained(tmp_path)
    loaded = vfmk.AdaptedSam.from_pretrained(base, tmp_path)
    assert torch.equal(embedding(loaded), before)
    channels.apply(loaded, MAP).load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    assert torch.equal(embedding(loaded), embedding(with_necks))


def test_a_map_outlives_the_adapters_that_it_came_after_or_before(sam):
    plain = embedding(channels.apply(copy.deepcopy(sam), MAP))
    config = vfmk.VFMAdapterConfig(rank=4, modules_to_save=("neck",))
    for early in (True, False):
        model = vfmk.get_adapted_model(channels.apply(sam, MAP) if early else sam, config)
        if not early:
            channels.apply(model, MAP)
        model.modules_to_save["default"]["image_encoder/neck"][3].bias.data += 1
        assert not torch.equal(embedding(model), plain)
        assert torch.equal(embedding(model.unload()), plain)
        assert not has_map(channels.remove(sam))


@pytest.mark.parametrize("early", [True, False])
def test_a_map_holds_in_every_copy_that_peft_has_of_the_neck(sam, early):
    before = embedding(copy.deepcopy(sam))
    if early:
        channels.apply(sam, MAP)
    model = peft.get_peft_model(sam, LORA_AND_NECK)
    model.add_adapter("second", LORA_AND_NECK)
    vary_pefts(model).eval()
    if not early:
        channels.apply(model, MAP)
    model.add_adapter("later", LORA_AND_NECK)
    for name in ("default", "second", "later"):
        model.set_adapter(name)
        mapped = embedding(model)
        assert is_gathered(mapped, before) == (name == "later")
        channels.remove(model)
        assert not has_map(model)
        assert is_gathered(mapped, embedding(model))
        channels.apply(model, MAP)
    with model.disable_adapter():
        assert is_gathered(embedding(model), before)
    assert is_gathered(embedding(model.unload()), before)
    assert not has_map(channels.remove(sam))


def test_on_an_image_encoder(sam):
    before = embedding(sam)
    channels.apply(sam.image_encoder, MAP)
    assert is_gathered(embedding(sam), before)


@pytest.mark.parametrize(
    "pairs", [(), ((0, 5),), tuple((i, (i + 1) % 64) for i in range(64))], ids=len
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_moves_every_bit_of_fused_norms(sam, pairs, dtype, autocast):
    map, image = ChannelMap(pairs, 64), IMAGE.to(dtype)
    encoder = sam.image_encoder.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        own = encoder(image)
        before = vfmk.accelerate(encoder)(image)
        after = channels.apply(encoder, map)(image)
    assert torch.equal(after, before[:, map.index])
    exact = dtype == torch.float32 and not autocast
    assert relative_error(before, own) <= (2e-5 if exact else 5e-2)


def test_a_norm_of_another_dtype(sam):
    """As type promotion has it in SAM's: a norm in float32 on what is in bfloat16."""
    norm, x = sam.image_encoder.neck[3], IMAGE.new_ones(1, 64, 2, 3).bfloat16()
    before = norm(x)
    channels.apply(sam, MAP)
    assert norm(x).dtype == before.dtype == torch.float32
    assert is_gathered(norm(x), before)


def test_together_with_accelerate_in_any_order(sam):
    accelerated = mapped = False
    seen = {(accelerated, mapped): embedding(sam)}
    # accelerate, apply, restore, remove, apply, accelerate, remove, restore
    for change_map in (False, True, False, True, True, False, True, False):
        if change_map:
            channels.remove(sam) if mapped else channels.apply(sam, MAP)
            mapped = not mapped
        else:
            vfmk.restore(sam) if accelerated else vfmk.accelerate(sam)
            accelerated = not accelerated
        output = embedding(sam)
        assert torch.equal(output, seen.setdefault((accelerated, mapped), output))
        assert has_map(sam) == mapped
        assert has_fused_norm(sam) == (accelerated or mapped)
    assert torch.equal(seen[True, True], seen[True, False][:, MAP.index])
    assert is_gathered(seen[False, True], seen[False, False])


def test_restore_gives_the_norms_of_every_adapter_back(with_necks):
    model = with_necks
    before = embeddings(model)
    vfmk.accelerate(model).set_adapter("norm")
    add_adapter(model, "later", "neck")
    fused = embeddings(model)
    assert all(relative_error(fused[name], before[name]) <= 2e-5 for name in before)
    model.set_adapter("convolution")
    vfmk.restore(model)
    after = embeddings(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not has_fused_norm(model)


def test_export(sam):
    encoder = channels.apply(vfmk.accelerate(sam), MAP).image_encoder
    with torch.no_grad():
        program = torch.export.export(encoder, (IMAGE,))
        assert torch.equal(program.module()(IMAGE), encoder(IMAGE))


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
    for second in (MAP, ChannelMap(((0, 7),), 64)):
        with pytest.raises(ValueError, match="has a channel map already; remove it first"):
            channels.apply(sam, second)
    sam.image_encoder.neck[3] = torch.nn.Identity()
    with pytest.raises(TypeError, match=r"neck must end in .* LayerNorm2d, ends in a Ident"):
        channels.apply(sam, MAP)
    sam.image_encoder.neck = torch.nn.Identity()
    with pytest.raises(TypeError, match="remove: the neck must end in"):
        channels.remove(sam)
