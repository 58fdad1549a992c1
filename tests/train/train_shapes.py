"""A short run on shapes; as a program, one that another test kills or starts several of."""

import argparse
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import torch

import vfmk.data
from tests.shapes import Shapes
from vfmk.tasks.build import ModelConfig, build_task
from vfmk.tasks.task import Task
from vfmk.train.config import TrainConfig
from vfmk.train.loop import TrainResult, train
from vfmk.train.stream import EvaluationImages, TrainingImages


def build(task: str, adapter: str = "vfm", dropout: float = 0.1) -> Task:
    torch.manual_seed(0)
    config = ModelConfig(task, adapter=adapter, rank=8, dropout=dropout)
    return build_task(config, Shapes(task, 0).classes)


def images(task: Task, count: int, train: bool = True, **options: Any) -> Any:
    transform = vfmk.data.transforms(task.name, task.sam.image_encoder.img_size, train)
    dataset = Shapes(task.name, count, seed=int(train), **options)
    if train:
        return TrainingImages(dataset, transform, task.prepare, seed=0)
    return EvaluationImages(dataset, transform, task.prepare_evaluation)


def train_shapes(
    task: Task, out: Path | None = None, *, count: int = 8, **options: Any
) -> TrainResult:
    """`options` are those of `train` and the fields of TrainConfig."""
    passed = {key: options.pop(key) for key in ("resume", "progress") if key in options}
    config = TrainConfig(**{"schedule": "cosine", "learning_rate": 2e-3, **options})
    out = out or Path(tempfile.mkdtemp())
    return train(task, images(task, count), images(task, 4, train=False), config, out, **passed)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kill-at", type=int, help="after this many steps, before a checkpoint")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--ema", type=float, default=0.0)
    parser.add_argument("--dropout", type=float, default=0.1)
    args = parser.parse_args()
    torch.set_num_threads(1)

    def progress(done: int, steps: int, loss: float) -> None:
        if done == args.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    train_shapes(
        build("promptable", dropout=args.dropout),
        args.out,
        epochs=1.5,
        batch_size=args.batch_size,
        accumulation=args.accumulation,
        ema=args.ema,
        checkpoint_every=2,
        resume=True,
        progress=progress,
    )


if __name__ == "__main__":
    main()
