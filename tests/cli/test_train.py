"""`vfmk train`, `eval` and `export`, as a person calls them."""

import json
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

pytest.importorskip("torchmetrics")
pytest.importorskip("accelerate")

import vfmk
import vfmk.data
from tests.shapes import CLASSES, Shapes
from vfmk.cli import app
from vfmk.cli.progress import plain_errors
from vfmk.tasks import load_task
from vfmk.train.processes import by_all
from vfmk.train.run import load_run


@pytest.fixture(autouse=True)
def data(monkeypatch):
    """Shapes in place of files; the split "val" has others."""

    def open_dataset(path, task, *, split=None, skip_bad=False, classes=None):
        assert task != "promptable" or classes is None
        dataset = Shapes(task, 4 if split == "few" else 5, seed=int(split == "val"))
        dataset.skipped = ["bad.png is unreadable: [cut]"] * skip_bad
        return dataset

    monkeypatch.setattr(vfmk.data, "open_dataset", open_dataset, raising=False)
    monkeypatch.setattr(vfmk.data, "digest", lambda dataset: f"{dataset.classes} {dataset.seed}")


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def train(out, *arguments, task="promptable", code=0):
    common = ("--data", "shapes", "--epochs", 1, "--learning-rate", 1e-3)
    if not {"decoder", "full"} & set(arguments):
        common += ("--rank", 4)
    return call("train", "--task", task, "--out", out, *common, *arguments, code=code)


def assert_is_picture(path):
    with Image.open(path) as image:
        assert min(image.size) > 100


def test_train_eval_and_export(tmp_path):
    run = tmp_path / "run"
    output = train(run, "--eval-split", "val", "--model", "tiny", "--adapter", "vfm")
    assert "iou" in output
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 2  # 5 images, 2 a step
    config = json.loads((run / "config.json").read_text())
    assert (config["model"]["adapter"], config["train"]["epochs"]) == ("vfm", 1)
    for picture in ("loss.png", "grid.png"):
        assert_is_picture(run / picture)
    adapted = vfmk.AdaptedSam.from_pretrained(vfmk.load_sam("tiny"), run / "adapter")
    trained, _ = load_run(run)
    for name, tensor in adapted.adapters.state_dict().items():
        assert torch.equal(tensor, trained.model.adapters.state_dict()[name])

    for _ in range(2):  # the same again is no conflict
        call("eval", "--run", run, "--data", "shapes", "--split", "val")
    report = run / "eval" / "shapes-val"
    assert json.loads((report / "metrics.json").read_text()) == metrics["best"]
    for picture in ("loss.png", "grid.png"):
        assert_is_picture(report / picture)
    for other in (report, run):
        output = call("eval", "--run", run, "--data", "shapes", "--out", other, code=1)
        assert "choose another folder by --out" in output.replace("\n", " ")
    call("eval", "--run", run, "--data", "shapes")
    assert (run / "eval" / "shapes" / "metrics.json").exists()

    output = call("export", "--run", run)
    assert "encoder.pt2" in output.replace("\n", "")  # however long the path
    exported = json.loads((run / "export" / "metrics.json").read_text())
    assert exported["program_error"] <= 1e-3
    assert exported["grid_impossible"] == ""
    for picture in ("loss.png", "grid.png"):
        assert_is_picture(run / "export" / picture)
    program = torch.export.load(run / "export" / "encoder.pt2").module()
    image = 255 * torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        expected = trained.sam.image_encoder(trained.sam.preprocess(image))
    torch.testing.assert_close(program(image), expected, atol=1e-3, rtol=1e-3)
    assert exported["onnx_impossible"] == ""
    assert exported["onnx_error"] <= 1e-3
    assert (run / "export" / "encoder.onnx").exists()


@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_every_fifth_image_is_held_out(tmp_path, task):
    train(tmp_path, "--adapter", "decoder", task=task)
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == 2  # 4 images, 2 a step
    assert_is_picture(tmp_path / "grid.png")
    assert load_task(tmp_path / "adapter", vfmk.load_sam("tiny")).classes == CLASSES


def test_what_is_skipped_is_shown_and_reported(tmp_path):
    skipped = ["bad.png is unreadable: [cut]"]
    shown = "left out 1 of the records: bad.png is unreadable: [cut]"
    output = train(tmp_path, "--adapter", "decoder", "--skip-bad")
    assert shown in " ".join(output.split())
    assert json.loads((tmp_path / "config.json").read_text())["skipped"] == skipped
    output = call("eval", "--run", tmp_path, "--data", "shapes", "--skip-bad")
    assert shown in " ".join(output.split())
    report = json.loads((tmp_path / "eval" / "shapes" / "config.json").read_text())
    assert report["evaluation"]["skipped"] == skipped
    assert "left out" not in call("eval", "--run", tmp_path, "--data", "shapes")


def test_every_field_of_the_adapter_can_be_chosen(tmp_path):
    train(
        tmp_path,
        "--no-global-branch",
        "--gradient-checkpointing",
        *("--conv", "static", "--kernel-size", 5, "--scale", 0.5, "--num-heads", 2),
        *("--token-dim", 16, "--low-dim", 4, "--num-queries", 3),
        *("--sublayers", "attn", "--layers", "0,2"),
    )
    task, _ = load_run(tmp_path)
    assert task.model.config == vfmk.VFMAdapterConfig(
        rank=4,
        conv="static",
        global_branch=False,
        kernel_size=5,
        scale=0.5,
        num_heads=2,
        token_dim=16,
        low_dim=4,
        num_queries=3,
        sublayers=("attn",),
        layers_to_transform=(0, 2),
    )
    train(tmp_path, "--resume", "auto", code=1)  # another model


def test_export_without_its_data_says_so(tmp_path, monkeypatch):
    train(tmp_path, "--adapter", "decoder")

    def gone(path, task, **options):
        raise FileNotFoundError(f"open_dataset: {path} does not exist")

    monkeypatch.setattr(vfmk.data, "open_dataset", gone)
    output = call("export", "--run", tmp_path).replace("\n", " ")
    assert "no picture grid: open_dataset: shapes does not exist" in output


def test_resume(tmp_path):
    train(tmp_path, "--adapter", "decoder")
    before = (tmp_path / "best.pt").read_bytes()
    assert "holds a run" in train(tmp_path, "--adapter", "decoder", code=1)
    train(tmp_path, "--adapter", "decoder", "--resume", "auto", "--workers", 1)
    assert (tmp_path / "best.pt").read_bytes() == before
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["train"]["workers"] == 1  # what was asked for at the last start
    output = train(tmp_path, "--adapter", "decoder", "--resume", "auto", "--seed", 1, code=1)
    assert "seed was 0, is 1" in output
    assert json.loads((tmp_path / "config.json").read_text()) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--adapter", "full", "--train-module", "mask_decoder"), "modules_to_save goes with"),
        (("--adapter", "full", "--rank", 8), "ModelConfig: rank goes with the adapters vfm and"),
        (("--batch-size", 0), "TrainConfig: batch_size must be at least 1, got 0"),
        (("--model", "vit_x"), "name must be one of tiny"),
        (("--conv", "sparse"), "'sparse' is not one of"),
        (("--kernel-size", 4), "VFMAdapterConfig: kernel_size must be odd"),
        (("--layers", "all"), "--layers must be indices such as 2,5,8,11, got 'all'"),
        (("--layers", "99"), "layers_to_transform"),
        (("--adapter", "full", "--scale", 2), "scale must go with adapter 'vfm', got 'full'"),
        (("--adapter", "decoder", "--gradient-checkpointing"), "gradient_checkpointing is of the"),
        (("--precision", "fp16"), "vfmk train: precision 'fp16' needs a GPU"),
        (("--split", "few"), "shapes has 4 images; with fewer than 5 none is held out for"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    code = 2 if "sparse" in arguments else 1  # of the command line itself
    output = " ".join(train(tmp_path / "run", *arguments, code=code).split())
    assert message in output
    assert "train: train:" not in output
    assert not (tmp_path / "run").exists()


def test_eval_and_export_need_a_run(tmp_path):
    for command in (("eval", "--data", "shapes"), ("export",)):
        assert "is missing" in call(*command, "--run", tmp_path, code=1).replace("\n", " ")


def test_another_path_to_the_same_checkpoint(tmp_path, monkeypatch):
    """The run goes on with it and is evaluated from anywhere; another checkpoint is refused."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    state = vfmk.load_sam("tiny").state_dict()
    save_file(state, first / "sam.safetensors")
    monkeypatch.chdir(first)
    options = ("--adapter", "decoder", "--checkpoint")
    train("run", *options, "sam.safetensors")
    run = first / "run"
    monkeypatch.chdir(second)
    evaluate = ("eval", "--run", run, "--data", "shapes")
    call(*evaluate)
    moved = second / "moved.safetensors"
    (first / "sam.safetensors").rename(moved)
    assert "sam.safetensors" in call(*evaluate, code=1).replace("\n", "")
    for command in (evaluate, ("export", "--run", run)):
        call(*command, "--checkpoint", moved)
    train(run, *options, moved, "--resume", "auto")
    call(*evaluate)
    state["image_encoder.pos_embed"] += 1
    save_file(state, moved)
    for output in (call(*evaluate, code=1), call("export", "--run", run, code=1)):
        assert "was trained on other frozen weights" in output.replace("\n", " ")


def test_eval_can_be_told_how_to_compute(tmp_path, monkeypatch):
    """As a run in fp16 must be where there is no GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train(tmp_path, "--adapter", "decoder")
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "train": {**document["train"], "precision": "fp16"}}))
    evaluate = ("eval", "--run", tmp_path, "--data", "shapes")
    assert "precision 'fp16' needs a GPU" in call(*evaluate, code=1).replace("\n", " ")
    call(*evaluate, "--precision", "no", "--batch-size", 3)
    report = json.loads((tmp_path / "eval" / "shapes" / "config.json").read_text())
    assert report["evaluation"]["precision"] == "no"
    output = call(*evaluate, "--precision", "no", "--batch-size", 0, code=1)
    assert "batch_size must be at least 1, got 0" in output.replace("\n", " ")
    for wrong in ("{", "[]", "{}", json.dumps({**document, "train": {"speed": 1}})):
        path.write_text(wrong)
        output = call(*evaluate, code=1).replace("\n", "")
        assert "config.json is malformed" in output


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    output = train(tmp_path / "run", "--adapter", "lora", code=1)
    assert output.endswith("it needs: pip install vfmk[train,lora]\n")


@pytest.mark.parametrize(("rank", "output"), [("0", "vfmk train: wrong"), ("1", "1")])
def test_what_all_processes_raise_the_first_prints(monkeypatch, rank, output):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as exit, plain_errors("train", "train"):
        raise by_all(ValueError("train: wrong"))
    assert str(exit.value) == output
    with pytest.raises(SystemExit, match="vfmk train: alone"), plain_errors("train", "train"):
        raise ValueError("alone")
