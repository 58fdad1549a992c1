"""Adapters in the real `segment_anything` classes."""

import copy
import dataclasses

import pytest
import torch

import vfmk
from tests.sam.models import SMALL, randomise, records
from vfmk.nn.config import CONVOLUTIONS
from vfmk.nn.vfm_adapter import VFMAdapterStack

RELEASED = vfmk.VFMAdapterConfig(conv="dense", global_branch=False)


@pytest.mark.parametrize(
    "config", [SMALL, RELEASED, vfmk.VFMAdapterConfig(conv="static")], ids=repr
)
def test_a_new_adapter_changes_no_bit(sam, image, config):
    before = sam.image_encoder(image)
    keys = list(sam.state_dict())
    adapted = vfmk.get_adapted_model(sam, config)
    assert torch.equal(adapted.sam.image_encoder(image), before)
    assert list(sam.state_dict()) == keys


def test_block_equals_segment_anything_with_windows(sam, image):
    """The adapted block's own attention path, on a grid that windows do not divide."""
    adapted = vfmk.get_adapted_model(copy.deepcopy(sam), SMALL)
    x = torch.randn(1, 10, 9, 128)
    for index in (0, 2):  # windowed, global
        expected = sam.image_encoder.blocks[index]
        if index == 2:
            x = torch.randn(1, 16, 16, 128)
        assert torch.equal(adapted.sam.image_encoder.blocks[index](x), expected(x))


@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_only_adapters_train(sam, conv):
    adapted = vfmk.get_adapted_model(sam, dataclasses.replace(SMALL, conv=conv))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.1)
    adapted.train()
    for _ in range(2):  # the up-projection starts at zero, so the rest moves from the second step
        optimizer.zero_grad()
        sum(output["low_res_logits"].square().sum() for output in adapted(records())).backward()
        optimizer.step()
    for name, parameter in adapted.named_parameters():
        is_adapter = name.startswith("adapters.")
        assert parameter.requires_grad == is_adapter, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == is_adapter, name


def test_a_sample_does_not_depend_on_its_batch(sam, image):
    adapted = vfmk.get_adapted_model(sam, SMALL)
    randomise(adapted)
    with torch.no_grad():
        together = sam.image_encoder(image)
        alone = torch.cat([sam.image_encoder(one[None]) for one in image])
    assert ((together - alone).norm() / alone.norm()).item() < 1e-6


def test_share_of_trainable_parameters(sam, capsys):
    adapted = vfmk.get_adapted_model(sam, SMALL)
    trainable, total = adapted.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in adapted.adapters.parameters())
    assert total == trainable + sum(p.numel() for p in sam.parameters())
    adapted.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {trainable:,} || all params:")


def test_share_of_vit_b():
    """Of the released variant, trainable parameters over the encoder's: about 3 %."""
    with torch.device("meta"):
        encoder = vfmk.load_sam("vit_b").image_encoder
        adapters = VFMAdapterStack(768, tuple(range(len(encoder.blocks))), RELEASED)
    trainable, total = (sum(p.numel() for p in m.parameters()) for m in (adapters, encoder))
    assert total == 89_670_912
    assert 0.027 < trainable / total < 0.032


def test_forward_equals_segment_anything(sam):
    with torch.no_grad():
        expected = sam(records(), multimask_output=True)
        outputs = vfmk.get_adapted_model(sam, SMALL)(records(), multimask_output=True)
    for output, truth in zip(outputs, expected, strict=True):
        assert output.keys() == truth.keys()
        assert all(torch.equal(output[key], truth[key]) for key in truth)


def test_disable_adapter_and_unload_give_the_base(sam, image):
    config = vfmk.VFMAdapterConfig(rank=8, modules_to_save=("image_encoder.neck",))
    before, block_class = sam.image_encoder(image), type(sam.image_encoder.blocks[0])
    adapted = vfmk.get_adapted_model(sam, config)
    randomise(adapted)
    with torch.no_grad():
        sam.image_encoder.neck[0].weight.mul_(2)
    changed = sam.image_encoder(image)
    assert not torch.equal(changed, before)
    with adapted.disable_adapter():
        assert torch.equal(sam.image_encoder(image), before)
    assert torch.equal(sam.image_encoder(image), changed)
    assert adapted.unload() is sam
    assert torch.equal(sam.image_encoder(image), before)
    assert type(sam.image_encoder.blocks[0]) is block_class
    assert all(parameter.requires_grad for parameter in sam.parameters() if parameter.numel() > 0)


def test_disabling_nests_and_saving_inside_keeps_what_was_trained(sam, image, tmp_path):
    config = vfmk.VFMAdapterConfig(rank=8, modules_to_save=("image_encoder.neck",))
    before, base = sam.image_encoder(image), copy.deepcopy(sam)
    adapted = vfmk.get_adapted_model(sam, config)
    randomise(adapted)
    with torch.no_grad():
        sam.image_encoder.neck[0].weight.mul_(2)
    changed = sam.image_encoder(image)
    with adapted.disable_adapter():
        adapted.save_pretrained(tmp_path)
        with adapted.disable_adapter():
            pass
        assert torch.equal(sam.image_encoder(image), before)
    loaded = vfmk.AdaptedSam.from_pretrained(base, tmp_path)
    assert torch.equal(loaded.sam.image_encoder(image), changed)
    with adapted.disable_adapter():
        adapted.unload()
    assert torch.equal(sam.image_encoder(image), before)
    for use in (adapted.unload, lambda: adapted.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="this adapted model was unloaded"):
            use()


def test_what_is_moved_while_adapted_is_moved_whole(sam, image):
    config = vfmk.VFMAdapterConfig(rank=8, modules_to_save=("image_encoder.neck",))
    adapted = vfmk.get_adapted_model(sam, config).double()
    with adapted.disable_adapter():
        assert sam.image_encoder(image.double()).dtype == torch.float64
    assert {p.dtype for p in adapted.unload().parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (vfmk.VFMAdapterConfig(layers_to_transform=(1, 6)), r"layers_to_transform has \[6\]"),
        (vfmk.VFMAdapterConfig(modules_to_save=("head",)), "modules_to_save has 'head'"),
        (
            vfmk.VFMAdapterConfig(modules_to_save=("mask_decoder.transformer", "mask_decoder")),
            "modules_to_save has 'mask_decoder.transformer' inside 'mask_decoder'",
        ),
        (vfmk.VFMAdapterConfig(modules_to_save=("image_encoder",)), "holds the adapters"),
        (vfmk.VFMAdapterConfig(modules_to_save=("image_encoder.blocks.1",)), "holds the adapters"),
    ],
)
def test_refuses_what_the_model_lacks(sam, config, message):
    with pytest.raises(ValueError, match=f"^get_adapted_model: .*{message}"):
        vfmk.get_adapted_model(sam, config)


def test_refuses_other_models_and_configurations(sam):
    with pytest.raises(TypeError, match="sam must be a segment_anything Sam, got Linear"):
        vfmk.get_adapted_model(torch.nn.Linear(1, 1), SMALL)
    with pytest.raises(TypeError, match="config must be a VFMAdapterConfig, got dict"):
        vfmk.get_adapted_model(sam, {"rank": 4})
    vfmk.get_adapted_model(sam, SMALL)
    with pytest.raises(ValueError, match="adapted already"):
        vfmk.get_adapted_model(sam, SMALL)
