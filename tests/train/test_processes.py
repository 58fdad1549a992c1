"""Two processes: one's scores, faults that stop both, resuming where only the first has files."""

import os
import random
import re
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("accelerate")

from accelerate import DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule

from tests.shapes import Shapes
from tests.train.several import in_each
from tests.train.train_shapes import assert_same_tree, build, images, train_shapes
from vfmk.tasks.build import trainable
from vfmk.train.checkpoint import load_checkpoint, trained_weights
from vfmk.train.config import TrainConfig
from vfmk.train.evaluation import evaluate
from vfmk.train.log import read_log
from vfmk.train.loop import TrainResult
from vfmk.train.processes import jointly, start_accelerator

TASKS = ("promptable", "semantic", "detection", "instance")


def shaken(task: str, target: dict) -> dict:
    """The truth of an image, a few pixels off, and one more find on every second image."""
    index = int(target["files"][0].split("-")[1].split(".")[0])
    _, truth = Shapes(task, 3)[index]
    shift = 1 + 2 * index
    if task == "semantic":
        return {"semantic": torch.as_tensor(truth["semantic"]).long().roll(shift, 1)}
    found = {key: torch.as_tensor(truth[key]) for key in ("boxes", "labels") if key in truth}
    if task != "promptable":
        found["boxes"] = found["boxes"] + shift
        found["scores"] = torch.tensor([0.9, 0.5]) - 0.1 * index
    if "masks" in truth:
        found["masks"] = torch.as_tensor(truth["masks"]).roll(shift, 2)
    if task != "promptable" and index % 2:
        found = {key: torch.cat([value, value[:1]]) for key, value in found.items()}
    return found


def scores() -> dict[str, dict[str, float]]:
    """Of every task, on three images and on one."""
    accelerator, found = start_accelerator("no"), {}
    for name in TASKS:
        task = build(name, "decoder")
        task.predict = lambda batch, targets, name=name: [shaken(name, t) for t in targets]
        for count in (3, 1):
            stream = images(task, count, train=False)
            found[f"{name} {count}"] = evaluate(task, stream, accelerator, TrainConfig())
    return found


def test_scores_are_those_of_one_process():
    """Three images are two and one; of one image, the second process has none."""
    expected = scores()
    first, second = in_each(scores, [(), ()])
    assert first == second
    assert first.keys() == expected.keys()
    for name, values in expected.items():
        assert first[name] == pytest.approx(values, abs=1e-12), name
        if name.endswith("3"):
            assert all(0.1 < value < 0.99 for value in values.values()), values


def killed_at(step: int | None):
    def progress(done: int, steps: int, loss: float) -> None:
        if done == step:  # before the checkpoint of that step
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


def ask_for_fsdp() -> None:
    """As `accelerate launch --use_fsdp`. Accelerate gives it to GPUs alone, PyTorch to CPUs too."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    PartialState(cpu=True)._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def run(out: Path, kill_at: int | None, options: dict, fsdp: bool) -> TrainResult:
    task = build("promptable")
    if fsdp:
        task = build("semantic", "decoder")  # FSDP takes long over the shapes of many tensors
        ask_for_fsdp()
    fixed = {"epochs": 1.5, "ema": 0.9, "checkpoint_every": 1, "resume": True}
    return train_shapes(task, out, progress=killed_at(kill_at), **fixed, **options)


@pytest.mark.parametrize(
    ("processes", "options", "fsdp"),
    [
        (1, {}, False),
        (2, {"batch_size": 1, "accumulation": 2, "workers": 2, "eval_every": 2}, False),
        (2, {"eval_every": 2}, True),
    ],
)
def test_resumes_bit_for_bit_where_only_the_first_has_the_folder(
    tmp_path, processes, options, fsdp
):
    """Killed after any step but the last; weights, moments, averages and the generators end as in
    a run that was not killed."""

    def start(folder: Path, kill_at: int | None = None) -> list:
        own = [(folder / str(rank), kill_at, options, fsdp) for rank in range(processes)]
        return in_each(run, own)

    whole = start(tmp_path / "whole")
    assert whole == [whole[0]] * processes
    kill_at = random.SystemRandom().randint(1, whole[0].steps - 1)
    killed = tmp_path / f"killed at {kill_at}"
    assert start(killed, kill_at)[0] == -signal.SIGKILL
    assert start(killed) == whole
    for name in ("last.pt", "best.pt"):
        first, second = (
            load_checkpoint(tmp_path / "whole" / "0" / name),
            load_checkpoint(killed / "0" / name),
        )
        assert_same_tree(first, second)
    fields = ("step", "loss", "lr", "evaluation")
    first, second = (
        [
            {field: line.get(field) for field in fields}
            for line in read_log(folder / "0" / "log.jsonl")
        ]
        for folder in (tmp_path / "whole", killed)
    )
    assert first == second
    assert not (killed / "1").exists()


def trained(out: Path, batch_size: int, fsdp: bool = False) -> int:
    """Trains without dropout, whose draws belong to a process; how many parts FSDP has made."""
    if fsdp:
        ask_for_fsdp()
    task = build("promptable", dropout=0, modules_to_save=("mask_decoder",))
    train_shapes(task, out, epochs=1.5, batch_size=batch_size, ema=0.5, eval_every=2)
    return sum(isinstance(module, FSDPModule) for module in task.modules())


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    """With a copy of the model each, and with a share of it each.

    The gradients are summed in another order, and Adam divides them by their size, so what is
    nearly nothing differs most: hence a hundredth of the way that each tensor went, by norms
    (0.0013 at most where this was written). Wrong shares of the batch make it about the whole. A
    bias of keys is left out: a softmax does not feel it, so that its gradient is but rounding.
    """
    assert in_each(trained, [(tmp_path / "one", 4)]) == [0]
    assert in_each(trained, [(tmp_path / "two", 2)] * 2) == [0, 0]
    blocks = len(build("promptable").sam.image_encoder.blocks)
    parts = [blocks + 1] * 2
    assert in_each(trained, [(tmp_path / "fsdp", 2, True)] * 2) == parts
    start = build("promptable", dropout=0, modules_to_save=("mask_decoder",))
    start = trained_weights(trainable(start))
    for name in ("last.pt", "best.pt"):
        first, *others = (load_checkpoint(tmp_path / f / name) for f in ("one", "two", "fsdp"))
        for other in others:
            assert first["step"] == other["step"]
            for key, weight in first["weights"].items():
                if key.endswith("k_proj.bias"):
                    continue
                way = (weight - start[key]).norm()
                assert way > 0, key
                assert (other["weights"][key] - weight).norm() < 1e-2 * way, key
            scores = "last" if name == "last.pt" else "scores"
            assert other[scores] == pytest.approx(first[scores], abs=1e-3)


def trained_with_fsdp(out: Path) -> dict[str, float]:
    ask_for_fsdp()
    task = build("instance", "lora")
    return train_shapes(task, out, epochs=1, batch_size=4, precision="bf16").last


def test_fsdp_trains_lora_in_bf16(tmp_path):
    pytest.importorskip("peft")
    first, second = in_each(trained_with_fsdp, [(tmp_path,)] * 2)
    assert first == second
    assert next(iter(first)) == "box_map"


def faulty(folder: Path, is_first: bool) -> list[Exception | None]:
    """What stops each of these runs."""
    loss, gradient, unreached = (build("semantic", "decoder") for _ in range(3))
    unreached.sam.mask_decoder.iou_token.requires_grad_(True)
    if not is_first:
        loss.head.classify.register_forward_hook(lambda head, _, z: z / (not head.training))
        gradient.head.classify.bias.register_hook(lambda gradient: gradient * float("inf"))
    if is_first:
        for name in ("finished", "cut"):
            (folder / name).mkdir()
            (folder / name / "last.pt").write_bytes(b"PK")
    plain, found = build("semantic", "decoder"), []
    for task, options in (
        (loss, {}),
        (gradient, {}),
        (unreached, {}),
        (plain, {"out": folder / "finished"}),
        (plain, {"out": folder / "cut", "resume": True}),
        (plain, {"identity": {"digest": is_first}}),
    ):
        try:
            found.append(train_shapes(task, epochs=0.5, **options))
        except Exception as error:
            found.append(error)
    try:
        jointly(start_accelerator("no"), (folder / "finished" / "last.pt").read_bytes)
    except OSError as error:
        found.append(error)
    return found


def test_what_stops_one_stops_both_with_its_message(tmp_path):
    """Loss and gradient go wrong in the second process; the files are the first's."""
    outcomes = in_each(faulty, [(tmp_path, True), (tmp_path / "elsewhere", False)])
    for faults in outcomes:
        assert [type(fault) for fault in faults] == [
            FloatingPointError, FloatingPointError, ValueError,
            FileExistsError, ValueError, ValueError, FileNotFoundError,
        ], faults  # fmt: skip
        for fault, part in zip(
            faults,
            (
                r"loss nan at step 0, files shapes-",
                r"at step 0, files .*: not finite for head\.classify\.bias",
                r"no gradient reached model\.mask_decoder\.iou_token",
                r"finished holds a run; resume it or choose",
                r"cut/last\.pt is unreadable",
                r"process 1 is of another run: digest was True, is False",
                r"elsewhere/finished/last\.pt",
            ),
            strict=True,
        ):
            assert re.search(part, str(fault))
    for first, second in zip(*outcomes, strict=True):
        is_of_all = "no gradient reached" not in str(first)  # that may be so in one alone
        assert (str(first) == str(second)) == is_of_all
        assert hasattr(first, "by_all") == hasattr(second, "by_all") == is_of_all


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("ACCELERATE_USE_FSDP", "accelerate gives FSDP to several processes on GPUs alone, got 1"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed is not supported"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM is not supported"),
    ],
)
def test_refuses_what_it_cannot_share_a_model_by(monkeypatch, variable, message):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"^train: {message}"):
        start_accelerator("no")
