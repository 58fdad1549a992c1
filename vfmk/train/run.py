"""A run from data on disk to a folder with weights and a report.

config.json    what was asked for at the last start, the classes, digests of the data, what
               `skip_bad` left out
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
from typing import TYPE_CHECKING, Any

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
from vfmk.train.log import LOG, read_log, to_json
from vfmk.train.loop import TrainResult, train
from vfmk.train.processes import from_first, jointly, start_accelerator
from vfmk.train.stream import EvaluationImages, TrainingImages

if TYPE_CHECKING:
    from accelerate import Accelerator

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
    """Train and write the report into `out`.

    A run is resumed whatever path now leads to the model's checkpoint and to the data: of the one
    what stays frozen must be the same, of the other `vfmk.data.digest`.

    Args:
        on_skipped: called in every process, before the first step, with why `skip_bad` left
            records out, if it did.

    Raises:
        ImportError, OSError, ValueError: as `vfmk.data.open_dataset`, `build_task` and
            `start_accelerator`.
        FileExistsError, FloatingPointError, ValueError: as `vfmk.train.loop.train`.
    """
    from vfmk.data import digest

    accelerator = start_accelerator(config.precision)
    if model.checkpoint is not None:
        model = dataclasses.replace(model, checkpoint=str(Path(model.checkpoint).resolve()))
    training, evaluation, classes, opened = jointly(accelerator, lambda: open_all(model.task, data))
    skipped = [reason for dataset in opened.values() for reason in dataset.skipped]
    if skipped:
        on_skipped(skipped)
    task = jointly(accelerator, lambda: _seeded_task(model, classes, config.seed))
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
    named = {name: value for name, value in document["model"].items() if name != "checkpoint"}
    identity = {"model": named, **{key: document[key] for key in ("classes", "digest", "frozen")}}
    evaluation_images = _evaluation_images(task, evaluation)
    result = train(
        task,
        TrainingImages(training, _transform(model.task, size, True), task.prepare, config.seed),
        evaluation_images,
        config,
        out,
        accelerator,
        resume=resume,
        identity=identity,
        on_start=lambda: write_json(out / CONFIG, document),
        progress=progress,
    )
    if accelerator.is_main_process:
        # With FSDP, the task that was trained has but a share of its weights here.
        task = _with_best_weights(_seeded_task(model, classes, config.seed), out)
        save_task(task, out / "adapter")
        write_json(out / METRICS, result._asdict())
        pictures.draw_loss(out / "loss.png", losses(out))
        draw_grid(out / "grid.png", task, evaluation_images, document, accelerator)
    return result


def evaluate_run(
    run: Path,
    path: str,
    out: Path,
    *,
    split: str | None = None,
    skip_bad: bool = False,
    model_checkpoint: Path | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
    workers: int = 0,
    on_skipped: Callable[[Sequence[str]], None] = lambda reasons: None,
) -> dict[str, float]:
    """Score a run's best weights on all of a data set, and write the report into `out`.

    Args:
        path, split, skip_bad: of the data, as in `DataConfig`.
        model_checkpoint: as in `load_run`.
        batch_size, precision: as in `TrainConfig`; None: as trained.
        on_skipped: as in `train_run`.

    Raises:
        FileNotFoundError, ValueError: `run` is no finished or running training; what `TrainConfig`
            and `start_accelerator` refuse.
        FileExistsError: `out` holds another report.
    """
    from vfmk.data import digest

    given = {"batch_size": batch_size, "precision": precision, "workers": workers}
    chosen: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    config = dataclasses.replace(TrainConfig(**_read_config(run)["train"]), **chosen)
    accelerator = start_accelerator(config.precision)
    task, document = jointly(accelerator, lambda: load_run(run, model_checkpoint))
    dataset = jointly(
        accelerator, lambda: open_one(task.name, path, split, skip_bad, document["classes"])
    )
    if dataset.skipped:
        on_skipped(dataset.skipped)
    asked: dict[str, Any] = {
        "run": str(run),
        "data": {"path": path, "split": split, "skip_bad": skip_bad},
        "precision": config.precision,
        "digest": digest(dataset),
        "skipped": dataset.skipped,
    }
    from_first(accelerator, lambda: _check_report(out, asked["digest"]))
    task.to(accelerator.device)
    images = _evaluation_images(task, dataset)
    scores = evaluate(task, images, accelerator, config)
    if accelerator.is_main_process:
        write_json(out / CONFIG, {**document, "evaluation": asked})
        write_json(out / METRICS, scores)
        pictures.draw_loss(out / "loss.png", losses(run))
        draw_grid(out / "grid.png", task, images, document, accelerator)
    return scores


def load_run(run: Path, model_checkpoint: Path | None = None) -> tuple[Task, dict[str, Any]]:
    """The task with a run's best weights, in eval mode and frozen, and its config.json.

    Args:
        model_checkpoint: that of the model, where it is not any more where it was.

    Raises:
        FileNotFoundError: `run` lacks config.json or best.pt.
        ValueError: they are malformed, do not fit each other, or the model's checkpoint is not what
            it was.
    """
    document = _read_config(run)
    if model_checkpoint is not None:
        document["model"]["checkpoint"] = str(model_checkpoint.resolve())
    model = ModelConfig(**document["model"])
    task = _seeded_task(model, document["classes"], document["train"]["seed"])
    if (frozen := _frozen(task)) != document["frozen"]:
        raise ValueError(
            f"load_run: {run} was trained on other frozen weights: fingerprint"
            f" {document['frozen'][:12]}…, {model.checkpoint or model.model} has {frozen[:12]}…"
        )
    return _with_best_weights(task, run).eval().requires_grad_(False), document


def evaluated_images(task: Task, document: Mapping[str, Any]) -> EvaluationImages:
    """Those that a run was evaluated on; raises as `vfmk.data.open_dataset`."""
    model, data = ModelConfig(**document["model"]), DataConfig(**document["data"])
    _, evaluation, _, _ = open_all(model.task, data)
    return _evaluation_images(task, evaluation)


def _read_config(run: Path) -> dict[str, Any]:
    for name in (CONFIG, checkpoint.BEST):
        if not (run / name).is_file():
            raise FileNotFoundError(f"load_run: {run / name} is missing; is {run} a run of train?")
    try:
        document: dict[str, Any] = json.loads((run / CONFIG).read_bytes())
        ModelConfig(**document["model"])
        DataConfig(**document["data"])
        TrainConfig(**document["train"])
        if not isinstance(document["classes"], list) or not isinstance(document["frozen"], str):
            raise TypeError("classes must be a list, and frozen a fingerprint")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"load_run: {run / CONFIG} is malformed: {error!r}") from error
    return document


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
    path: Path,
    after: Task,
    images: EvaluationImages,
    document: Mapping[str, Any],
    accelerator: "Accelerator",
) -> None:
    """Some images, their truths, and what is predicted before training and by `after`."""
    from vfmk.data import collate

    model = ModelConfig(**document["model"])
    before = _seeded_task(model, document["classes"], document["train"]["seed"])
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
    """Of every step, from the log."""
    return [line["loss"] for line in read_log(run / LOG) if "loss" in line]


def write_json(path: Path, document: Any) -> None:
    """Makes the folder; numbers that are not finite are null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, to_json(document, indent=1).encode())
