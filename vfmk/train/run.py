"""A run from data on disk to a folder with weights and a report.

config.json    what was asked for, the classes, digests of the data, what `skip_bad` left out
log.jsonl      a line for each step and evaluation
last.pt        to resume from; best.pt: the weights of the best evaluation
adapter/       the best weights, for `vfmk.tasks.load_task`
metrics.json   scores before, at the end, and at best
loss.png, grid.png    the loss; image, truth, before and after for some evaluation images
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vfmk._files import write_whole
from vfmk.data.dataset import TaskName
from vfmk.sam.base import fingerprint_of
from vfmk.tasks import pictures
from vfmk.tasks.build import ModelConfig, build_task, trainable
from vfmk.tasks.saved import save_task
from vfmk.tasks.task import Task
from vfmk.train import checkpoint
from vfmk.train.config import TrainConfig
from vfmk.train.datasets import DataConfig, open_all, open_one
from vfmk.train.evaluation import evaluate, predict
from vfmk.train.log import LOG, read_log
from vfmk.train.loop import TrainResult, train
from vfmk.train.processes import from_first, start_accelerator
from vfmk.train.stream import EvaluationImages, TrainingImages

PICTURES = 8
CONFIG, METRICS = "config.json", "metrics.json"


def train_run(
    model: ModelConfig,
    data: DataConfig,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    on_skipped: Callable[[Sequence[str]], None] = lambda reasons: None,
) -> TrainResult:
    """Train and write the report into `out`; see `vfmk.train.loop.train` for what it raises.

    Args:
        on_skipped: called in every process, before the first step, with why `skip_bad` left
            records out, if it did.
    """
    from vfmk.data import digest

    training, evaluation, classes, opened = open_all(model.task, data)
    skipped = [reason for dataset in opened.values() for reason in dataset.skipped]
    if skipped:
        on_skipped(skipped)
    task = _seeded_task(model, classes, config.seed)
    size = task.sam.image_encoder.img_size
    document: dict[str, Any] = {
        "model": dataclasses.asdict(model),
        "data": dataclasses.asdict(data),
        "train": dataclasses.asdict(config),
        "classes": classes,
        "digest": {name: digest(dataset) for name, dataset in opened.items()},
        "skipped": skipped,
        "frozen": _frozen(task),
        "trainable_parameters": sum(p.numel() for p in trainable(task).values()),
        "all_parameters": sum(p.numel() for p in task.parameters()),
    }
    accelerator = start_accelerator(config.precision)

    def announce() -> None:
        if not (out / checkpoint.LAST).exists():
            write_json(out / CONFIG, document)

    from_first(accelerator, announce)
    evaluation_images = _evaluation_images(task, evaluation)
    result = train(
        task,
        TrainingImages(training, _transform(model.task, size, True), task.prepare, config.seed),
        evaluation_images,
        config,
        out,
        resume=resume,
        identity={key: document[key] for key in ("model", "classes", "digest", "frozen")},
        progress=progress,
    )
    if accelerator.is_main_process:
        # With FSDP, the task that was trained has but a share of its weights here.
        task = _with_best_weights(_seeded_task(model, classes, config.seed), out)
        save_task(task, out / "adapter")
        write_json(out / METRICS, result._asdict())
        pictures.draw_loss(out / "loss.png", losses(out))
        draw_grid(out / "grid.png", task, evaluation_images, document)
    return result


def evaluate_run(
    run: Path,
    data: DataConfig,
    out: Path,
    *,
    batch_size: int | None = None,
    workers: int = 0,
    on_skipped: Callable[[Sequence[str]], None] = lambda reasons: None,
) -> dict[str, float]:
    """Score a run's best weights on all of `data.path`, and write the report into `out`.

    Args:
        on_skipped: as in `train_run`.

    Raises:
        FileNotFoundError, ValueError: `run` is no finished or running training.
        FileExistsError: `out` holds another report.
    """
    from vfmk.data import digest

    task, document = load_run(run)
    config = TrainConfig(**document["train"])
    model, classes = ModelConfig(**document["model"]), document["classes"]
    dataset = open_one(model.task, data.path, data.split, data.skip_bad, classes)
    if dataset.skipped:
        on_skipped(dataset.skipped)
    asked: dict[str, Any] = {
        "run": str(run),
        "data": dataclasses.asdict(data),
        "digest": digest(dataset),
        "skipped": dataset.skipped,
    }
    accelerator = start_accelerator(config.precision)
    from_first(accelerator, lambda: _check_report(out, asked["digest"]))
    task.to(accelerator.device)
    images = _evaluation_images(task, dataset)
    chosen = dataclasses.replace(
        config, batch_size=batch_size or config.batch_size, workers=workers
    )
    scores = evaluate(task, images, accelerator, chosen)
    if accelerator.is_main_process:
        write_json(out / CONFIG, {**document, "evaluation": asked})
        write_json(out / METRICS, scores)
        pictures.draw_loss(out / "loss.png", losses(run))
        draw_grid(out / "grid.png", task, images, document)
    return scores


def load_run(run: Path) -> tuple[Task, dict[str, Any]]:
    """The task with a run's best weights, in eval mode and frozen, and its config.json.

    Raises:
        FileNotFoundError: `run` lacks config.json or best.pt.
        ValueError: they do not fit each other, or the model's checkpoint is not what it was.
    """
    for name in (CONFIG, checkpoint.BEST):
        if not (run / name).is_file():
            raise FileNotFoundError(f"load_run: {run / name} is missing; is {run} a run of train?")
    document = json.loads((run / CONFIG).read_text())
    model = ModelConfig(**document["model"])
    task = _seeded_task(model, document["classes"], document["train"]["seed"])
    if (frozen := _frozen(task)) != document["frozen"]:
        raise ValueError(
            f"load_run: {run} was trained on other frozen weights: fingerprint"
            f" {document['frozen'][:12]}…, {model.checkpoint or model.model} has {frozen[:12]}…"
        )
    return _with_best_weights(task, run).eval().requires_grad_(False), document


def held_out_images(task: Task, document: Mapping[str, Any]) -> EvaluationImages:
    """Those that a run was evaluated on; raises as `vfmk.data.open_dataset`."""
    model, data = ModelConfig(**document["model"]), DataConfig(**document["data"])
    _, evaluation, _, _ = open_all(model.task, data)
    return _evaluation_images(task, evaluation)


def _check_report(out: Path, digest: str) -> None:
    """That nothing but a report on the same data is overwritten."""
    path = out / CONFIG
    if path.exists():
        report = json.loads(path.read_text()).get("evaluation", {})
        if report.get("digest") != digest:
            raise FileExistsError(
                f"eval: {out} holds a report on {report.get('data', {}).get('path', 'other data')};"
                " choose another folder by --out"
            )


def _seeded_task(model: ModelConfig, classes: list[str], seed: int) -> Task:
    """The task as training starts with it."""
    torch.manual_seed(seed)
    return build_task(model, classes)


def _with_best_weights(task: Task, run: Path) -> Task:
    best = checkpoint.load_checkpoint(run / checkpoint.BEST)
    checkpoint.load_weights(trainable(task), best["weights"])
    return task


def _frozen(task: Task) -> str:
    """Fingerprint of the weights that a checkpoint leaves out."""
    trained = trainable(task).keys()
    return fingerprint_of({k: v for k, v in task.state_dict().items() if k not in trained})


def _transform(task: TaskName, size: int, train: bool) -> Callable[..., Any]:
    from vfmk.data import transforms

    return transforms(task, size, train)


def _evaluation_images(task: Task, dataset: Any) -> EvaluationImages:
    transform = _transform(task.name, task.sam.image_encoder.img_size, False)
    return EvaluationImages(dataset, transform, task.prepare_evaluation)


@torch.no_grad()
def draw_grid(
    path: Path, after: Task, images: EvaluationImages, document: Mapping[str, Any]
) -> None:
    """Some images, their truths, and what is predicted before training and by `after`."""
    from vfmk.data import collate

    config = TrainConfig(**document["train"])
    before = _seeded_task(ModelConfig(**document["model"]), document["classes"], config.seed)
    accelerator = start_accelerator(config.precision)
    rows = []
    for index in range(min(PICTURES, len(images))):
        original, truth = images.dataset[index]
        shown = [truth]
        for task in (before, after):
            task.to(accelerator.device).eval()
            (prediction,), _ = predict(task, collate([images[index]]), accelerator)
            shown.append(prediction)
        rows.append((original, shown))
    pictures.draw_predictions(path, rows, document["classes"])


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run / LOG) if "loss" in line]


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(document, indent=1).encode())
