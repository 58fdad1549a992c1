"""A saved task predicts what it did, on its base alone; and what is refused."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("torchvision")
pytest.importorskip("peft")

import peft

import vfmk
from tests.shapes import CLASSES, Shapes
from vfmk.sam import base
from vfmk.tasks import load_task, save_task
from vfmk.tasks.build import ADAPTERS, ModelConfig, build_task, trainable
from vfmk.tasks.semantic import SemanticTask
from vfmk.tasks.task import Task


def plain_sam():
    return vfmk.accelerate(vfmk.load_sam("tiny"))


def randomise(task: Task) -> Task:
    """Move what is trained away from where it starts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(task).values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return task.eval()


def built(name: str, adapter: str = "decoder", **options) -> Task:
    torch.manual_seed(0)
    rank = {"rank": 4} if adapter in ("vfm", "lora") else {}
    config = ModelConfig(name, adapter=adapter, **rank, **options)
    return randomise(build_task(config, classes(name)))


def classes(name: str) -> list[str]:
    return Shapes(name, 0).classes


@torch.no_grad()
def predicted(task: Task) -> dict[str, torch.Tensor]:
    """For an image that is not square, of noise."""
    generator = torch.Generator().manual_seed(2)
    image = torch.randint(256, (1, 3, 128, 128), generator=generator, dtype=torch.uint8)
    target = {
        "input_size": (96, 128),
        "original_size": (60, 80),
        "prompt_points": torch.tensor([[30.0, 40.0], [90.0, 70.0]]),
    }
    (prediction,) = task.predict(image, [target])
    assert all(value.numel() for value in prediction.values())
    return prediction


def assert_same(loaded: Task, task: Task) -> None:
    found, truth = predicted(loaded), predicted(task)
    assert found.keys() == truth.keys()
    for key in truth:
        assert torch.equal(found[key], truth[key]), key


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", ["promptable", "semantic", "detection", "instance"])
def test_round_trip(tmp_path, name, adapter):
    task = built(name, adapter)
    save_task(task, tmp_path)
    loaded = load_task(tmp_path, plain_sam())
    assert type(loaded) is type(task)
    assert loaded.classes == task.classes == tuple(classes(name))
    assert not loaded.training
    assert not trainable(loaded)
    assert_same(loaded, task)
    trained = load_task(tmp_path, plain_sam(), is_trainable=True)
    assert trainable(trained).keys() == trainable(task).keys()


PARTS = ("neck", "mask_decoder", "prompt_encoder")


@pytest.mark.parametrize("adapter", ["vfm", "lora"])
def test_modules_to_save(tmp_path, adapter):
    task = built("promptable", adapter, modules_to_save=PARTS)
    save_task(task, tmp_path)
    loaded = load_task(tmp_path, plain_sam(), is_trainable=True)
    assert_same(loaded, task)
    assert trainable(loaded).keys() == trainable(task).keys()
    save_task(loaded, tmp_path / "again")
    assert_same(load_task(tmp_path / "again", plain_sam()), task)


def test_an_adapter_above_lora_and_weights_unfrozen_by_hand(tmp_path):
    sam = plain_sam()
    lora = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["neck"])
    peft.inject_adapter_in_model(lora, sam)
    adapted = vfmk.get_adapted_model(sam, vfmk.VFMAdapterConfig(rank=4))
    sam.mask_decoder.iou_token.requires_grad_(True)
    task = randomise(SemanticTask(adapted, CLASSES))
    save_task(task, tmp_path)
    plain = plain_sam()
    loaded = load_task(tmp_path, plain)
    assert_same(loaded, task)
    token = "mask_decoder.iou_token.weight"
    assert torch.equal(plain.state_dict()[token], sam.state_dict()[token])


def test_the_adapters_are_vfmks_and_pefts_own(tmp_path):
    """Without the head, by the libraries that know nothing of it."""
    image = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    task = built("semantic", "vfm")
    save_task(task, tmp_path)
    adapted = vfmk.AdaptedSam.from_pretrained(plain_sam(), tmp_path)
    assert torch.equal(adapted.sam.image_encoder(image), task.sam.image_encoder(image))

    task = built("promptable", "lora", modules_to_save=PARTS)
    save_task(task, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()  # of the task before
    sam = plain_sam()
    model = peft.PeftModel.from_pretrained(sam, tmp_path / "lora").eval()
    point = {"point_coords": torch.tensor([[[9.0, 60.0]]]), "point_labels": torch.ones(1, 1)}
    records = [{"image": 255 * torch.rand(3, 128, 128), "original_size": (99, 99), **point}]
    (found,), (truth,) = model(records, multimask_output=True), task.sam(records, True)
    assert torch.equal(found["low_res_logits"], truth["low_res_logits"])
    # Nothing was left out, nor added to, what peft's own saving writes.
    model.save_pretrained(tmp_path / "peft")
    ours = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert ours.keys() - {f"base_model.model.{name}" for name, _ in sam.named_buffers()} <= (
        theirs.keys()
    )
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


PROGRAM = """
import sys, torch, vfmk
from vfmk.tasks import load_task
from tests.tasks.test_saved import plain_sam, predicted
torch.set_num_threads(int(sys.argv[3]))
torch.save(predicted(load_task(sys.argv[1], plain_sam())), sys.argv[2])
"""


def test_loads_in_another_process(tmp_path):
    task = built("instance", "lora")
    save_task(task, tmp_path)
    output, threads = tmp_path / "predicted.pt", str(torch.get_num_threads())
    subprocess.run([sys.executable, "-c", PROGRAM, tmp_path, output, threads], check=True)
    found, truth = torch.load(output), predicted(task)
    assert all(torch.equal(found[key], truth[key]) for key in truth)


@pytest.fixture(params=["vfm", "lora", "decoder"])
def saved(request, tmp_path):
    """A folder with a task, and its base."""
    save_task(built("semantic", request.param), tmp_path)
    return tmp_path, plain_sam()


def assert_refused(folder, sam, error, message):
    """And the Sam is as it was."""
    state, sam.training = dict(sam.state_dict()), True
    copied = {name: tensor.clone() for name, tensor in state.items()}
    sam.mask_decoder.requires_grad_(False)
    required_grad = [p.requires_grad for p in sam.parameters()]
    classes = [type(module) for module in sam.modules()]
    with pytest.raises(error, match=message):
        load_task(folder, sam)
    assert list(sam.state_dict()) == list(state)
    assert all(torch.equal(sam.state_dict()[name], copied[name]) for name in copied)
    assert [p.requires_grad for p in sam.parameters()] == required_grad
    assert [type(module) for module in sam.modules()] == classes
    assert sam.training
    assert not hasattr(sam, "peft_config")


def test_refuses_another_base(saved):
    folder, sam = saved
    with torch.no_grad():
        sam.image_encoder.blocks[0].norm1.bias[0] += 1
    assert_refused(folder, sam, ValueError, r"was trained on another base: fingerprint \w{12}…")


def test_refuses_cut_missing_and_mixed_files(saved):
    folder, sam = saved
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert_refused(folder, sam, ValueError, rf"{path.name} is (cut|not as save_task wrote it)")
        path.unlink()
        assert_refused(folder, sam, FileNotFoundError, f"{path.name} is missing")
        path.write_bytes(whole)
    card = (folder / "task.json").read_bytes()
    save_task(randomise(load_task(folder, plain_sam(), is_trainable=True)), folder)
    (folder / "task.json").write_bytes(card)  # killed before the last file
    assert_refused(folder, sam, ValueError, "or replaced by another save")


def rewrite(folder, name, change) -> None:
    """Apply `change` to the tensors of a file, as if `save_task` had written it so."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    edit(folder, lambda card: card["files"].update({name: sha256(folder / name)}))


def edit(folder, change) -> None:
    card = json.loads((folder / "task.json").read_text())
    change(card)
    (folder / "task.json").write_text(json.dumps(card))


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


BIAS, LORA = "head.classify.bias", "base_model.model.image_encoder.blocks.0.attn.qkv.lora_A.weight"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("task_model", lambda t: t.pop(BIAS), f"lacks {BIAS}"),
        ("task_model", lambda t: t.update(x=torch.ones(1)), "has a stray x"),
        (
            "task_model",
            lambda t: t.update({BIAS: torch.ones(9)}),
            rf"has {BIAS} \[9\], expected \[3\]",
        ),
        ("lora/adapter_model", lambda t: t.pop(LORA), f"lacks {LORA}"),
        ("lora/adapter_model", lambda t: t.update(x=torch.ones(1)), "has a stray x"),
        ("lora/adapter_model", lambda t: t.update({LORA: torch.ones(9)}), rf"has {LORA} \[9\]"),
    ],
)
def test_refuses_tensors_that_do_not_fit(tmp_path, file, change, message):
    save_task(built("semantic", "lora"), tmp_path)
    rewrite(tmp_path, f"{file}.safetensors", change)
    assert_refused(tmp_path, plain_sam(), ValueError, f"^load_task: .* does not fit: it {message}")


def test_refuses_weights_of_sam_that_do_not_fit(tmp_path):
    save_task(built("promptable", "decoder"), tmp_path)
    token = "sam.mask_decoder.iou_token.weight"
    rewrite(tmp_path, "task_model.safetensors", lambda tensors: tensors.pop(token))
    assert_refused(tmp_path, plain_sam(), ValueError, f"it lacks {token}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda card: card.update(task="depth"), "a task or files that this version does not know"),
        (lambda card: card["files"].update({"../x": ""}), "does not know: semantic, .*/x"),
        (lambda card: card.pop("classes"), "was not written by save_task"),
        (lambda card: card["classes"].append("star"), r"classify.bias \[3\], expected \[4\]"),
    ],
)
def test_refuses_another_card(saved, change, message):
    folder, sam = saved
    edit(folder, change)
    assert_refused(folder, sam, ValueError, message)


def test_refuses_what_is_no_base(tmp_path):
    save_task(built("semantic"), tmp_path)
    with pytest.raises(TypeError, match="sam must be a segment_anything Sam, got Linear"):
        load_task(tmp_path, torch.nn.Linear(1, 1))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with pytest.raises(ValueError, match=f"sam must be in float32, got {dtype}"):
            load_task(tmp_path, plain_sam().to(dtype))
    for adapter in ("vfm", "lora"):
        with pytest.raises(ValueError, match="sam has adapters already"):
            load_task(tmp_path, built("semantic", adapter).sam)


def test_lora_without_peft_names_it(tmp_path, monkeypatch):
    save_task(built("semantic", "lora"), tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert_refused(tmp_path, plain_sam(), ImportError, "holds LoRA, which needs peft")


def test_refuses_to_save_what_it_could_not_load(tmp_path):
    task = built("semantic", "lora")
    task.sam.image_encoder.pos_embed.requires_grad_(True)
    with pytest.raises(ValueError, match="pos_embed is trained beside LoRA, in a module"):
        save_task(task, tmp_path)
    task = built("semantic")
    peft.get_peft_model(task.sam.image_encoder, peft.LoraConfig(target_modules=["qkv"]))
    assert base.peft_layers(task.sam)
    with pytest.raises(ValueError, match=r"put into the whole of it, not into a part; .* none"):
        save_task(task, tmp_path)
    task = built("semantic")
    peft.inject_adapter_in_model(
        peft.IA3Config(target_modules=["qkv"], feedforward_modules=[]), task.sam
    )
    with pytest.raises(ValueError, match=r"must hold one LoRA.*'IA3'"):
        save_task(task, tmp_path)
