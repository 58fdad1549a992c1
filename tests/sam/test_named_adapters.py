"""Several adapters on one base, in peft's verbs."""

import copy

import pytest
import torch

import vfmk
from tests.sam.models import SMALL, randomise
from vfmk.sam.load import build_tiny_sam

OTHER = vfmk.VFMAdapterConfig(rank=4, conv="static", modules_to_save=("neck", "head"))
INNER = vfmk.VFMAdapterConfig(rank=4, conv="static", modules_to_save=("neck.0",))


@pytest.fixture
def adapted(sam):
    """With "default" away from where it starts, and a task head."""
    sam.add_module("head", torch.nn.Linear(64, 2))
    adapted = vfmk.get_adapted_model(sam, SMALL)
    randomise(adapted)
    return adapted


def trained(adapted) -> set[str]:
    return {name for name, p in adapted.named_parameters() if p.requires_grad}


def test_a_new_adapter_is_neither_active_nor_trainable(adapted, image):
    before, was_trained = adapted.sam.image_encoder(image), trained(adapted)
    adapted.add_adapter("other", OTHER)
    assert adapted.active_adapter == "default"
    assert trained(adapted) == was_trained
    assert torch.equal(adapted.sam.image_encoder(image), before)


def test_switching_gives_each_adapter_its_own_modules(adapted, image):
    sam = adapted.sam
    default = sam.image_encoder(image)
    with adapted.disable_adapter():
        base = sam.image_encoder(image)
    adapted.add_adapter("other", OTHER)
    adapted.add_adapter("inner", INNER)
    outputs = {}
    for name in ("other", "inner"):
        adapted.set_adapter(name)
        assert torch.equal(sam.image_encoder(image), base)
        randomise(adapted)
        outputs[name] = sam.image_encoder(image)
        assert not torch.equal(outputs[name], base)
    outputs["default"] = default
    for name in ("other", "inner", "default", "other"):
        adapted.set_adapter(name)
        assert adapted.active_adapter == name
        assert torch.equal(sam.image_encoder(image), outputs[name])
    assert sam.head.weight.requires_grad
    with adapted.disable_adapter():
        assert torch.equal(sam.image_encoder(image), base)
        adapted.set_adapter("inner")
        assert torch.equal(sam.image_encoder(image), base)
    assert torch.equal(sam.image_encoder(image), outputs["inner"])
    adapted.set_adapter("inner", inference_mode=True)
    assert not trained(adapted)


def test_deleting_the_active_adapter_activates_the_first_that_is_left(adapted, image):
    default = adapted.sam.image_encoder(image)
    adapted.add_adapter("other", OTHER)
    adapted.set_adapter("other")
    with pytest.warns(UserWarning, match="'other' was active; now 'default' is"):
        adapted.delete_adapter("other")
    assert adapted.active_adapter == "default"
    assert torch.equal(adapted.sam.image_encoder(image), default)
    assert not adapted.base_modules
    adapted.delete_adapter("default")
    assert adapted.active_adapter is None
    assert not trained(adapted)
    with pytest.raises(ValueError, match=r"save_pretrained: adapter None not found.*: none"):
        adapted.save_pretrained("unused")


def test_saves_and_loads_by_name(adapted, image, tmp_path):
    base = copy.deepcopy(adapted).unload()
    with torch.no_grad():
        base.head.weight.zero_()  # what others attached is no part of the base
    adapted.add_adapter("other", OTHER)
    adapted.set_adapter("other")
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "default", adapter_name="default")
    adapted.save_pretrained(tmp_path / "other")
    loaded = vfmk.AdaptedSam.from_pretrained(base, tmp_path / "default", is_trainable=True)
    loaded.train().load_adapter(tmp_path / "other", "again")
    assert loaded.active_adapter == "default"
    assert not loaded.training
    for name, own in (("again", "other"), ("default", "default")):
        loaded.set_adapter(name)
        adapted.set_adapter(own)
        assert torch.equal(loaded.sam.image_encoder(image), adapted.sam.image_encoder(image))
        assert torch.equal(loaded.sam.head.weight, adapted.sam.head.weight) == (name == "again")


def test_a_refused_adapter_leaves_no_trace(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    torch.manual_seed(1)
    stranger = vfmk.get_adapted_model(build_tiny_sam(), SMALL)
    names = list(stranger.state_dict())
    with pytest.raises(ValueError, match=r"^load_adapter: .* was trained on another base"):
        stranger.load_adapter(tmp_path, "other")
    assert list(stranger.state_dict()) == names


def test_unload_gives_back_the_base(sam, image):
    state, before = copy.deepcopy(sam.state_dict()), sam.image_encoder(image)
    sam.mask_decoder.requires_grad_(False)
    required_grad = [p.requires_grad for p in sam.parameters()]
    classes = [type(module) for module in sam.modules()]
    adapted = vfmk.get_adapted_model(sam, vfmk.VFMAdapterConfig(modules_to_save=("neck",)))
    adapted.add_adapter("inner", INNER)
    adapted.gradient_checkpointing_enable()
    for name in ("default", "inner"):
        adapted.set_adapter(name)
        randomise(adapted)
    assert adapted.unload() is sam
    assert list(sam.state_dict()) == list(state)
    assert all(torch.equal(sam.state_dict()[key], state[key]) for key in state)
    assert [p.requires_grad for p in sam.parameters()] == required_grad
    assert [type(module) for module in sam.modules()] == classes
    assert torch.equal(sam.image_encoder(image), before)


def test_a_state_dict_holds_every_adapter(adapted, image):
    adapted.add_adapter("other", OTHER)
    copied = copy.deepcopy(adapted)
    adapted.set_adapter("other")
    randomise(adapted)
    copied.load_state_dict(adapted.state_dict())
    for name in ("default", "other"):
        adapted.set_adapter(name)
        copied.set_adapter(name)
        assert torch.equal(copied.sam.image_encoder(image), adapted.sam.image_encoder(image))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m: m.add_adapter("default", SMALL), "'default' already exists"),
        (lambda m: m.add_adapter("a.b", SMALL), "a name without dots, got 'a.b'"),
        (lambda m: m.add_adapter("keys", SMALL), "'keys' is reserved"),
        (lambda m: m.set_adapter("x"), "set_adapter: adapter 'x' not found; there are: 'default'"),
        (lambda m: m.delete_adapter("x"), "delete_adapter: adapter 'x' not found"),
        (lambda m: m.save_pretrained("unused", "x"), "save_pretrained: adapter 'x' not found"),
        (
            lambda m: m.add_adapter("b", vfmk.VFMAdapterConfig(modules_to_save=("norm1",))),
            "add_adapter: modules_to_save has 'norm1'; it is the name of image_encoder.blocks.0",
        ),
    ],
)
def test_refuses(adapted, use, message):
    with pytest.raises(ValueError, match=message):
        use(adapted)
    assert list(adapted.adapters) == ["default"]
