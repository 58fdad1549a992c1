"""The data of a run: images to train on, and to evaluate on."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Subset

from vfmk.data.dataset import TaskName

if TYPE_CHECKING:
    from vfmk.data.dataset import RecordDataset

HELD_OUT = 5  # every fifth image is for evaluation, where no data is named for it


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


def open_all(
    task: TaskName, data: DataConfig
) -> tuple[Any, Any, list[str], dict[str, "RecordDataset"]]:
    """For training and for evaluation, the classes, and what was opened, by its use.

    Raises:
        ValueError: too few images to hold any out.
        OSError, ValueError: as `vfmk.data.open_dataset`.
    """
    training = open_one(task, data.path, data.split, data.skip_bad)
    classes = list(training.classes)
    if data.eval_path is None and data.eval_split is None:
        if len(training) < HELD_OUT:
            raise ValueError(
                f"train: {data.path} has {len(training)} images; with fewer than {HELD_OUT} none is"
                " held out for evaluation: name others by --eval-data or --eval-split"
            )
        held_out = range(HELD_OUT - 1, len(training), HELD_OUT)
        kept = [index for index in range(len(training)) if index not in held_out]
        return Subset(training, kept), Subset(training, held_out), classes, {"training": training}
    place = (data.eval_path or data.path, data.eval_split)
    if place == (data.path, data.split):
        return training, training, classes, {"training": training}
    evaluation = open_one(task, *place, data.skip_bad, classes)
    return training, evaluation, classes, {"training": training, "evaluation": evaluation}


def open_one(
    task: TaskName, path: str, split: str | None, skip_bad: bool, classes: list[str] | None = None
) -> "RecordDataset":
    """`classes` are those of the training; promptable objects have none."""
    from vfmk.data import open_dataset

    labels = None if task == "promptable" else classes
    return open_dataset(Path(path), task, split=split, skip_bad=skip_bad, classes=labels)
