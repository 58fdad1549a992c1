"""A run from data on disk to a folder with weights and a report.

config.json    what was asked for, the classes, digests of the data
log.jsonl      a line for each step and evaluation
last.pt        to resume from; best.pt: the weights of the best evaluation
adapter/       the best weights, for `vfmk.tasks.load_task`
metrics.json   scores before, at the end, and at best
loss.png, grid.png    the loss; image, truth, before and after for some evaluation images
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from vfmk._files import write_whole
from vfmk.data.dataset import TaskName
from vfmk.sam.base import fingerprint_of
from vfmk.tasks import pictures
from vfmk.tasks.build import ModelConfig, build_task, trainable
from vfmk.tasks.saved import save_task
from vfmk.tasks.task import Task
from vfmk.train import checkpoint
from vfmk.train.config import TrainConfig
from vfmk.train.loop import LOG, TrainResult, evaluate, predict, read_log, start_accelerator, train
from vfmk.train.stream import EvaluationImages, TrainingImages

HELD_OUT = 5  # every fifth image is for evaluation, where no data is named for it
PICTURES = 8
CONFIG, METRICS = "config.json", "metrics.json"


@dataclass(frozen=True)
class DataConfig:
    """Where the images are, as `vfmk.data.open_dataset` takes it.

    Args:
        path: of the training data.
        split: of it.
        eval_path, eval_split: the same for evaluation; with neither, every fifth image of the
            training data is held out.
        skip_bad: leave unreadable images out instead of refusing them.
    """

    path: str
    split: str | None = None
    eval_path: str | None = None
    eval_split: str | None = None
    skip_bad: bool = False


def train_run(
    model: ModelConfig,
    data: DataConfig,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> TrainResult:
    """Train and write the report into `out`; see `vfmk.train.loop.train` for what it raises."""
    training, evaluation, classes, digests = _datasets(model, data)
    task = _seeded_task(model, classes, config.seed)
    size = task.sam.image_encoder.img_size
    document: dict[str, Any] = {
        "model": dataclasses.asdict(model),
        "data": dataclasses.asdict(data),
        "train": dataclasses.asdict(config),
        "classes": classes,
        "digest": digests,
        "frozen": _frozen(task),
        "trainable_parameters": sum(p.numel() for p in trainable(task).values()),
        "all_parameters": sum(p.numel() for p in task.parameters()),
    }
    accelerator = start_accelerator(config.precision)
    if accelerator.is_main_process and not (out / checkpoint.LAST).exists():
        write_json(out / CONFIG, document)
    accelerator.wait_for_everyone()
    evaluation_images = _evaluation_images(task, evaluation, size)
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
        best = checkpoint.load_checkpoint(out / checkpoint.BEST)
        checkpoint.load_weights(trainable(task), best["weights"])
        save_task(task, out / "adapter", classes)
        write_json(out / METRICS, result._asdict())
        pictures.draw_loss(out / "loss.png", losses(out))
        before = _seeded_task(model, classes, config.seed)
        _draw(out / "grid.png", before, task, evaluation_images, classes, config.precision)
    return result


def evaluate_run(
    run: Path, data: DataConfig, out: Path, *, batch_size: int | None = None, workers: int = 0
) -> dict[str, float]:
    """Score a run's best weights on all of `data.path`, and write the report into `out`.

    Raises:
        FileNotFoundError, ValueError: `run` is no finished or running training.
    """
    from vfmk.data import digest, open_dataset

    task, document = load_run(run)
    config = TrainConfig(**document["train"])
    model, classes = ModelConfig(**document["model"]), document["classes"]
    dataset = open_dataset(
        Path(data.path),
        model.task,
        split=data.split,
        skip_bad=data.skip_bad,
        classes=_labels(model.task, classes),
    )
    accelerator = start_accelerator(config.precision)
    task.to(accelerator.device)
    images = _evaluation_images(task, dataset, task.sam.image_encoder.img_size)
    chosen = dataclasses.replace(
        config, batch_size=batch_size or config.batch_size, workers=workers
    )
    scores = evaluate(task, images, accelerator, chosen)
    if accelerator.is_main_process:
        asked = {"run": str(run), "data": dataclasses.asdict(data), "digest": digest(dataset)}
        write_json(out / CONFIG, {**document, "evaluation": asked})
        write_json(out / METRICS, scores)
        pictures.draw_loss(out / "loss.png", losses(run))
        before = _seeded_task(model, classes, config.seed)
        _draw(out / "grid.png", before, task, images, classes, config.precision)
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
    best = checkpoint.load_checkpoint(run / checkpoint.BEST)
    checkpoint.load_weights(trainable(task), best["weights"])
    return task.eval().requires_grad_(False), document


def _datasets(model: ModelConfig, data: DataConfig) -> tuple[Any, Any, list[str], dict[str, str]]:
    """For training and for evaluation, the classes, and the digests of what was opened."""
    from vfmk.data import digest, open_dataset

    training = open_dataset(Path(data.path), model.task, split=data.split, skip_bad=data.skip_bad)
    classes, digests = list(training.classes), {"training": digest(training)}
    if data.eval_path is None and data.eval_split is None:
        held_out = range(HELD_OUT - 1, len(training), HELD_OUT)
        kept = [index for index in range(len(training)) if index not in held_out]
        return Subset(training, kept), Subset(training, held_out), classes, digests
    evaluation = open_dataset(
        Path(data.eval_path or data.path),
        model.task,
        split=data.eval_split,
        skip_bad=data.skip_bad,
        classes=_labels(model.task, classes),
    )
    return training, evaluation, classes, digests | {"evaluation": digest(evaluation)}


def _labels(task: str, classes: list[str]) -> list[str] | None:
    """What another set of the task must be labelled by; promptable objects have no classes."""
    return None if task == "promptable" else classes


def _seeded_task(model: ModelConfig, classes: list[str], seed: int) -> Task:
    """The task as training starts with it."""
    torch.manual_seed(seed)
    return build_task(model, classes)


def _frozen(task: Task) -> str:
    """Fingerprint of the weights that a checkpoint leaves out."""
    trained = trainable(task).keys()
    return fingerprint_of({k: v for k, v in task.state_dict().items() if k not in trained})


def _transform(task: TaskName, size: int, train: bool) -> Callable[..., Any]:
    from vfmk.data import transforms

    return transforms(task, size, train)


def _evaluation_images(task: Task, dataset: Any, size: int) -> EvaluationImages:
    return EvaluationImages(dataset, _transform(task.name, size, False), task.prepare_evaluation)


@torch.no_grad()
def _draw(
    path: Path,
    before: Task,
    after: Task,
    images: EvaluationImages,
    classes: list[str],
    precision: str,
) -> None:
    from vfmk.data import collate

    accelerator = start_accelerator(precision)
    rows = []
    for index in range(min(PICTURES, len(images))):
        original, truth = images.dataset[index]
        shown = [truth]
        for task in (before, after):
            task.to(accelerator.device).eval()
            (prediction,), _ = predict(task, collate([images[index]]), accelerator)
            shown.append(prediction)
        rows.append((original, shown))
    pictures.draw_predictions(path, rows, classes)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run / LOG) if "loss" in line]


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(document, indent=1).encode())
