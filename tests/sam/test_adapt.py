"""Adapters in the real `segment_anything` classes."""

import copy
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import vfmk
from vfmk.sam.load import build_tiny_sam

SMALL = vfmk.VFMAdapterConfig(rank=8, token_dim=16, low_dim=4, num_queries=4)


@pytest.fixture
def sam():
    torch.manual_seed(0)
    return build_tiny_sam().eval()


@pytest.fixture
def image():
    return torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))


def records(count: int = 2) -> list[dict]:
    """Images of different sizes with different prompts."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(128, 96), (80, 128), (128, 128)][:count]
    batch = [
        {"image": 255 * torch.rand(3, *size, generator=generator), "original_size": (200, 150)}
        for size in sizes
    ]
    batch[0] |= {
        "point_coords": torch.tensor([[[9.0, 60.0]]] * 3),
        "point_labels": torch.ones(3, 1),
    }
    batch[1] |= {"boxes": torch.tensor([[3.0, 4.0, 50.0, 60.0]])}
    return batch


def randomise(adapted: vfmk.AdaptedSam) -> None:
    """Move the adapters away from where they start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


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


def test_only_adapters_train(sam):
    adapted = vfmk.get_adapted_model(sam, SMALL)
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


def test_share_of_trainable_parameters(sam, capsys):
    adapted = vfmk.get_adapted_model(sam, SMALL)
    trainable, total = adapted.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in adapted.adapters.parameters())
    assert total == trainable + sum(p.numel() for p in sam.parameters())
    adapted.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {trainable:,} || all params:")


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


def test_save_and_load(sam, tmp_path):
    config = vfmk.VFMAdapterConfig(rank=8, modules_to_save=("mask_decoder",))
    base = copy.deepcopy(sam)
    adapted = vfmk.get_adapted_model(sam, config)
    randomise(adapted)
    with torch.no_grad():
        adapted.sam.mask_decoder.mask_tokens.weight.add_(1)
    adapted.save_pretrained(tmp_path)
    loaded = vfmk.AdaptedSam.from_pretrained(base, tmp_path)
    assert loaded.config == config
    for output, truth in zip(loaded(records()), adapted(records()), strict=True):
        assert torch.equal(output["low_res_logits"], truth["low_res_logits"])
    assert not any(p.requires_grad for p in loaded.parameters())
    trained = vfmk.AdaptedSam.from_pretrained(loaded.unload(), tmp_path, is_trainable=True)
    assert trained.get_nb_trainable_parameters() == adapted.get_nb_trainable_parameters()


def test_a_base_in_bfloat16_is_the_same_base(sam, tmp_path):
    base = copy.deepcopy(sam).bfloat16()
    vfmk.get_adapted_model(sam, SMALL).save_pretrained(tmp_path)
    loaded = vfmk.AdaptedSam.from_pretrained(base, tmp_path)
    assert next(loaded.adapters.parameters()).dtype == torch.bfloat16


@pytest.fixture
def saved(sam, tmp_path):
    """A folder with an adapter, and the base that it goes with."""
    base = copy.deepcopy(sam)
    vfmk.get_adapted_model(sam, SMALL).save_pretrained(tmp_path)
    return tmp_path, base


def rewrite(folder, change) -> None:
    """Apply `change` to the tensors of the file, whose metadata stays."""
    from safetensors import safe_open

    path = folder / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


UP = "adapters.layers.0.attn.up.bias"


def test_refuses_another_base(saved):
    folder, base = saved
    with torch.no_grad():
        base.image_encoder.blocks[0].norm1.bias[0] += 1
    with pytest.raises(ValueError, match="trained on another base: fingerprint"):
        vfmk.AdaptedSam.from_pretrained(base, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(UP), f"it lacks {UP}"),
        (lambda tensors: tensors.update(x=torch.ones(1)), "it has a stray x"),
        (lambda tensors: tensors.update({UP: torch.ones(3)}), rf"{UP} \[3\], expected \[128\]"),
    ],
)
def test_refuses_tensors_that_do_not_fit(saved, image, change, message):
    folder, base = saved
    before = base.image_encoder(image)
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        vfmk.AdaptedSam.from_pretrained(base, folder)
    assert torch.equal(base.image_encoder(image), before)
    assert all(p.requires_grad for n, p in base.named_parameters() if "pos_embed" in n)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_refuses_a_cut_or_missing_file(saved, name):
    folder, base = saved
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{name} is cut"):
        vfmk.AdaptedSam.from_pretrained(base, folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        vfmk.AdaptedSam.from_pretrained(base, folder)


def test_refuses_foreign_files(saved):
    folder, base = saved
    save_file({"weight": torch.ones(2)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is not an adapter saved by vfmk"):
        vfmk.AdaptedSam.from_pretrained(base, folder)


def test_refuses_an_edited_configuration(saved):
    folder, base = saved
    path = folder / "adapter_config.json"
    document = json.loads(path.read_text())
    document["config"]["scale"] = 2.0
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"adapter_config\.json was edited"):
        vfmk.AdaptedSam.from_pretrained(base, folder)


def test_refuses_a_configuration_of_a_later_version(saved):
    folder, base = saved
    from safetensors import safe_open

    path = folder / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["vfmk_adapter"])
    document["config"]["novelty"] = 1
    save_file(load_file(path), path, metadata={"vfmk_adapter": json.dumps(document)})
    (folder / "adapter_config.json").write_text(json.dumps(document))
    with pytest.raises(
        ValueError, match=r"of vfmk .*no configuration that this version reads: .*novelty"
    ):
        vfmk.AdaptedSam.from_pretrained(base, folder)


SAVE_FOREVER = """
import sys, torch, vfmk
from vfmk.sam.load import build_tiny_sam
models = []
for rank in (4, 8):
    torch.manual_seed(0)
    sam = build_tiny_sam().eval()
    models.append(vfmk.get_adapted_model(sam, vfmk.VFMAdapterConfig(rank=rank)))
print("saving", flush=True)
while True:
    for model in models:
        model.save_pretrained(sys.argv[1])
"""


def test_a_killed_save_leaves_a_whole_adapter(sam, tmp_path):
    config = vfmk.VFMAdapterConfig(rank=8)
    vfmk.get_adapted_model(copy.deepcopy(sam), config).save_pretrained(tmp_path)
    for milliseconds in (3, 30, 80):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, tmp_path], stdout=subprocess.PIPE
        )
        process.stdout.readline()
        try:
            process.wait(milliseconds / 1000)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        loaded = vfmk.AdaptedSam.from_pretrained(sam, tmp_path)
        assert loaded.config.rank in (4, 8)
        loaded.unload()


def test_a_save_killed_between_its_files_leaves_the_new_adapter(sam, tmp_path):
    for rank in (4, 8):
        adapted = vfmk.get_adapted_model(sam, vfmk.VFMAdapterConfig(rank=rank))
        adapted.save_pretrained(tmp_path)
        adapted.unload()
        if rank == 4:
            before = (tmp_path / "adapter_config.json").read_bytes()
    (tmp_path / "adapter_config.json").write_bytes(before)
    assert vfmk.AdaptedSam.from_pretrained(sam, tmp_path).config.rank == 8


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
