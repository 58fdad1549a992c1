"""A short run on shapes."""

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
from vfmk.train.processes import start_accelerator
from vfmk.train.stream import EvaluationImages, TrainingImages


def assert_same_tree(a: Any, b: Any) -> None:
    """Equal bit for bit, whatever they are made of."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_tree(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same_tree(x, y)
    else:
        assert a == b


def build(task: str, adapter: str = "vfm", **options: Any) -> Task:
    torch.manual_seed(0)
    rank = {"rank": 8} if adapter in ("vfm", "lora") else {}
    config = ModelConfig(task, adapter=adapter, **rank, **options)
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
    kept = ("resume", "progress", "identity")
    passed = {key: options.pop(key) for key in kept if key in options}
    config = TrainConfig(**{"schedule": "cosine", "learning_rate": 2e-3, **options})
    out = out or Path(tempfile.mkdtemp())
    accelerator = start_accelerator(config.precision)
    return train(
        task, images(task, count), images(task, 4, train=False), config, out, accelerator, **passed
    )
