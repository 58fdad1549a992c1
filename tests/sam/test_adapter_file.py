"""Saving and loading an adapter, and what is refused."""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file, save_file

import vfmk
from tests.sam.models import SMALL, randomise, records
from vfmk.sam.base import fingerprint


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


@pytest.mark.parametrize("module", ["image_encoder.neck", "mask_decoder", "prompt_encoder", "head"])
def test_modules_to_save_train_save_and_load(sam, tmp_path, module):
    sam.add_module("head", torch.nn.Conv2d(64, 3, 1))
    base = copy.deepcopy(sam)
    before = copy.deepcopy(sam.get_submodule(module).state_dict())
    config = vfmk.VFMAdapterConfig(rank=4, modules_to_save=(module,))
    adapted = vfmk.get_adapted_model(sam, config)
    outputs = adapted(records())
    loss = sum(output["low_res_logits"].square().mean() for output in outputs)
    (loss + sam.head(sam.image_encoder(torch.zeros(1, 3, 128, 128))).mean()).backward()
    trained = [p for p in sam.parameters() if p.requires_grad]
    assert sum(bool(p.grad.any()) for p in trained if p.grad is not None) > 0
    torch.optim.SGD(trained, 0.1).step()
    adapted.save_pretrained(tmp_path)
    after = adapted.sam.get_submodule(module).state_dict()
    assert not all(torch.equal(after[name], before[name]) for name in before)
    loaded = vfmk.AdaptedSam.from_pretrained(base, tmp_path).sam.get_submodule(module).state_dict()
    assert all(torch.equal(loaded[name], after[name]) for name in before)
    with adapted.disable_adapter():
        own = adapted.sam.get_submodule(module).state_dict()
        assert all(torch.equal(own[name], before[name]) for name in before)


def test_the_configuration_tells_what_is_inside(sam, tmp_path):
    expected = fingerprint(sam)
    config = vfmk.VFMAdapterConfig(rank=8, modules_to_save=("mask_decoder",))
    adapted = vfmk.get_adapted_model(sam, config)
    adapted.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    assert document.pop("config") == {
        **dataclasses.asdict(config),
        "sublayers": ["attn", "mlp"],
        "modules_to_save": ["mask_decoder"],
    }
    assert document == {
        "adapter_type": "VFM_ADAPTER",
        "vfmk_version": version("vfmk"),
        "torch_version": torch.__version__,
        "base_fingerprint": expected,
        "peft_layers": [],
        "parameters": adapted.get_nb_trainable_parameters()[0],
    }


def test_a_base_in_bfloat16_is_the_same_base(sam, tmp_path):
    base = copy.deepcopy(sam).bfloat16()
    vfmk.get_adapted_model(sam, SMALL).save_pretrained(tmp_path)
    loaded = vfmk.AdaptedSam.from_pretrained(base, tmp_path)
    assert next(loaded.adapters.parameters()).dtype == torch.bfloat16


def test_the_fingerprint_is_of_the_base_as_it_was_at_injection(sam, tmp_path):
    base = copy.deepcopy(sam)
    adapted = vfmk.get_adapted_model(sam, SMALL).half()
    with torch.no_grad():
        sam.image_encoder.neck[0].weight.mul_(2)
    adapted.save_pretrained(tmp_path)
    vfmk.AdaptedSam.from_pretrained(base, tmp_path)


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
