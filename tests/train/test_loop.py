"""The loop in one process: its log, averages, what stops it."""

import json
import math

import pytest
import torch

from tests.train.train_shapes import build, images, train_shapes
from vfmk.data import collate
from vfmk.train import loop
from vfmk.train.checkpoint import load_checkpoint, trained_weights
from vfmk.train.config import TrainConfig
from vfmk.train.evaluation import evaluate
from vfmk.train.log import read_log
from vfmk.train.processes import start_accelerator


def test_accumulation_equals_a_larger_batch(tmp_path):
    """As in tests/train/test_processes.py, in one process."""
    weights = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        task = build("semantic", adapter="decoder")
        train_shapes(task, batch_size=batch_size, accumulation=accumulation, epochs=0.5, count=8)
        weights.append(trained_weights(dict(task.named_parameters())))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=2e-5, rtol=0)


def test_log_and_progress(tmp_path):
    calls = []
    task = build("semantic", adapter="decoder")
    result = train_shapes(
        task, tmp_path, epochs=2, batch_size=4, progress=lambda *call: calls.append(call)
    )
    lines = read_log(tmp_path / "log.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [0, 1, 2, 3]
    assert [line["epoch"] for line in steps] == [0, 0.5, 1, 1.5]
    for line in steps:
        assert line["loss"] == pytest.approx(line["cross_entropy"] + line["dice"])
        assert line["images_per_second"] == pytest.approx(4 / line["seconds"])
    assert [call[:2] for call in calls] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    evaluations = [line["evaluation"] for line in lines if "evaluation" in line]
    assert len(evaluations) == 2
    assert evaluations[-1] == result.last
    assert result.best == max(evaluations, key=lambda scores: scores["miou"])
    best = load_checkpoint(tmp_path / "best.pt")
    assert (best["scores"], best["step"]) == (result.best, result.best_step)


def test_averaged_weights_are_what_is_evaluated(tmp_path):
    """With decay 0.5 the average of 2 steps is (w1 + w2) / 2, its first being w1 itself."""
    after = {}
    for steps in (1, 2):
        task = build("semantic", adapter="decoder")
        config = {"warmup_steps": 9, "schedule": "step", "batch_size": 4, "max_grad_norm": 1e-9}
        # The milestones of runs of 1 and 2 steps lie differently; the first step's do not.
        train_shapes(task, epochs=steps / 2, ema=0.5, **config, out=tmp_path / str(steps))
        after[steps] = trained_weights(dict(task.named_parameters()))
    mean = load_checkpoint(tmp_path / "2" / "best.pt")["weights"]
    for name, weight in mean.items():
        torch.testing.assert_close(weight, (after[1][name] + after[2][name]) / 2)
        assert torch.equal(
            load_checkpoint(tmp_path / "2" / "last.pt")["weights"][name], after[2][name]
        )


def test_refuses_to_overwrite_and_to_resume_another_run(tmp_path):
    options = {"epochs": 0.25, "batch_size": 2}
    identity = {"model": {"adapter": "decoder", "rank": 8}}
    train_shapes(build("semantic", "decoder"), tmp_path, **options, identity=identity)
    with pytest.raises(FileExistsError, match="holds a run; resume it"):
        train_shapes(build("semantic", "decoder"), tmp_path, **options)
    with pytest.raises(ValueError, match=r"another run: learning_rate was 0\.002, is 0\.1; seed"):
        train_shapes(
            build("semantic", "decoder"),
            tmp_path,
            **options,
            resume=True,
            identity=identity,
            learning_rate=0.1,
            seed=1,
        )
    cut = tmp_path / ".last.pt.0123abcd.tmp"  # of a killed process, or of one that still writes
    cut.touch()
    other = {"model": {"adapter": "full", "rank": 8}}
    with pytest.raises(ValueError, match=r"another run: model\.adapter was 'decoder', is 'full'$"):
        train_shapes(build("semantic", "decoder"), tmp_path, **options, resume=True, identity=other)
    assert cut.exists()
    finished = train_shapes(
        build("semantic", "decoder"), tmp_path, **options, resume=True, identity=identity
    )
    assert finished.steps == 1
    assert not cut.exists()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, precision):
    """The checkpoint stays the last good one; the message has step, files, part and cause."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    task = build("semantic", "decoder")
    dtypes = set()
    task.head.classify.register_forward_hook(lambda head, _, logits: dtypes.add(logits.dtype))

    def poison(done, steps, loss):
        if done == 2:
            with torch.no_grad():
                task.head.classify.bias[0] = float("nan")

    with pytest.raises(FloatingPointError) as caught:
        train_shapes(
            task, tmp_path, epochs=1, batch_size=2, checkpoint_every=1, precision=precision,
            progress=poison,
        )  # fmt: skip
    message = str(caught.value)
    assert "loss nan at step 2, files shapes-" in message
    assert "cross_entropy is nan" in message
    assert "weights of head.classify.bias are not finite" in message
    state = load_checkpoint(tmp_path / "last.pt")
    assert state["step"] == 2
    assert dtypes == {torch.float32 if precision == "no" else torch.bfloat16}
    dtypes.clear()
    task(*collate([images(task, 1)[0, 0]]))
    assert dtypes == {torch.float32}  # the caller's task is as it was
    AcceleratorState._reset_state(True)


def test_a_gradient_that_is_not_finite_stops_the_run():
    task = build("semantic", "decoder")
    task.head.classify.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match=r"at step 0, files .*: not finite for head\.cl"):
        train_shapes(task, epochs=0.25)


def test_loss_scaling_skips_a_gradient_until_its_scale_cannot_be_to_blame(monkeypatch):
    """It is halved from 2 to 1 and to 1/2, at which the third gradient is an error."""
    accelerator = start_accelerator("no")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2)
    monkeypatch.setattr("tests.train.train_shapes.start_accelerator", lambda _: accelerator)
    task = build("semantic", "decoder")
    task.head.classify.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match=r"at step 2, files .*: not finite for head\.cl"):
        train_shapes(task, epochs=1)


def test_refuses_fp16_without_a_gpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="precision 'fp16' needs a GPU"):
        start_accelerator("fp16")


def test_any_score_is_better_than_nan_and_json_has_none(tmp_path, monkeypatch):
    scores = ({"miou": value} for value in (0.0, math.nan, 0.1, math.nan))
    monkeypatch.setattr(loop, "evaluate", lambda *_: next(scores))
    result = train_shapes(build("semantic", "decoder"), tmp_path, epochs=0.75, eval_every=0.25)
    assert (result.best, result.best_step) == ({"miou": 0.1}, 2)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["evaluation"]["miou"] for line in lines if "evaluation" in line] == [
        None, 0.1, None,
    ]  # fmt: skip


def test_what_no_gradient_reaches_stops_the_run():
    task = build("semantic", "decoder")
    task.sam.mask_decoder.iou_token.requires_grad_(True)
    with pytest.raises(ValueError, match=r"at step 0 no gradient reached model\.mask_decoder\.iou"):
        train_shapes(task, epochs=0.25)
    task.requires_grad_(False)
    task.sam.mask_decoder.iou_token.requires_grad_(True)
    with pytest.raises(ValueError, match="the loss at step 0 does not depend on what is trained"):
        train_shapes(task, epochs=0.25)
    task.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters that require grad"):
        train_shapes(task, epochs=0.25)


def test_refuses_an_empty_set():
    with pytest.raises(ValueError, match="no images for training"):
        train_shapes(build("semantic", "decoder"), count=0)


def test_evaluation_keeps_the_mode_and_moves_no_generator():
    task = build("semantic", "decoder").train()
    state = torch.get_rng_state()
    first, second = (
        evaluate(task, images(task, 3, train=False), start_accelerator("no"), TrainConfig())
        for _ in range(2)
    )
    assert first == second
    assert task.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cut_checkpoint_is_named(tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match=r"last\.pt is unreadable"):
        load_checkpoint(path)
    torch.save({"epoch": 1}, path)
    with pytest.raises(ValueError, match="not a checkpoint of vfmk train"):
        load_checkpoint(path)
