"""Adapters on a base into which peft has put LoRA."""

import copy

import pytest
import torch

import vfmk
from tests.sam.models import randomise, records
from vfmk.sam import base
from vfmk.sam.lora_file import save_lora

peft = pytest.importorskip("peft")
LORA = peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False)


def inject(sam):
    peft.inject_adapter_in_model(LORA, sam)


def wrap(sam):
    peft.get_peft_model(sam.image_encoder, LORA)


def wrap_and_assign(sam):
    sam.image_encoder = peft.get_peft_model(sam.image_encoder, LORA)


def test_both_parts_are_saved_and_loaded_from_files(sam, tmp_path):
    """LoRA by peft, the adapter by vfmk, into the plain base."""
    plain = copy.deepcopy(sam)
    inject(sam)
    adapted = vfmk.get_adapted_model(sam, vfmk.VFMAdapterConfig(rank=8, modules_to_save=("neck",)))
    randomise(adapted)
    with adapted.disable_adapter():
        assert save_lora(tmp_path / "lora", sam) == []
    adapted.save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(plain, tmp_path / "lora")
    loaded = vfmk.AdaptedSam.from_pretrained(plain, tmp_path)
    for output, truth in zip(loaded(records()), adapted(records()), strict=True):
        assert torch.equal(output["low_res_logits"], truth["low_res_logits"])


@pytest.mark.parametrize("add_lora", [inject, wrap, wrap_and_assign])
@pytest.mark.filterwarnings("ignore:.*config.*:UserWarning:peft")
def test_trains_saves_loads_and_unloads(sam, tmp_path, add_lora):
    plain, plain_fingerprint = copy.deepcopy(sam), base.fingerprint(sam)
    add_lora(sam)
    assert base.fingerprint(sam) == plain_fingerprint
    second, keys = copy.deepcopy(sam), list(sam.state_dict())
    required_grad = [p.requires_grad for p in sam.parameters()]
    before = sam(records(), multimask_output=False)

    config = vfmk.VFMAdapterConfig(rank=8, modules_to_save=("neck",))
    adapted = vfmk.accelerate(vfmk.restore(vfmk.accelerate(vfmk.get_adapted_model(sam, config))))
    vfmk.restore(adapted)
    for output, truth in zip(adapted(records()), before, strict=True):
        assert torch.equal(output["low_res_logits"], truth["low_res_logits"])
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.1)
    adapted.train()
    for _ in range(2):
        optimizer.zero_grad()
        sum(output["low_res_logits"].square().mean() for output in adapted(records())).backward()
        optimizer.step()
    adapted.eval()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "neck" in name for name in trained if name.startswith("sam."))
    assert all(p.grad.any() for p in adapted.parameters() if p.requires_grad)

    adapted.save_pretrained(tmp_path)
    second.load_state_dict(
        {k: v for k, v in sam.state_dict().items() if "lora_" in k}, strict=False
    )
    loaded = vfmk.AdaptedSam.from_pretrained(second, tmp_path)
    for output, truth in zip(loaded(records()), adapted(records()), strict=True):
        assert torch.equal(output["low_res_logits"], truth["low_res_logits"])
    with pytest.warns(UserWarning, match="trained with peft on the layers .*, sam has it on"):
        vfmk.AdaptedSam.from_pretrained(plain, tmp_path)

    assert list(adapted.unload().state_dict()) == keys
    assert [p.requires_grad for p in sam.parameters()] == required_grad
