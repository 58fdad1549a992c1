"""Opening a data set by its path: which source it is, and what of it is usable."""

import math
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from vfmk.data.coco import coco_records
from vfmk.data.dataset import (
    BACKGROUND,
    IGNORE,
    TASKS,
    DataError,
    Record,
    RecordDataset,
    TaskName,
    in_threads,
)
from vfmk.data.folder import has_pairs, masked_images, pairs_of_folder, pairs_of_manifest
from vfmk.data.voc import is_voc, voc_records

MANIFEST = "manifest.jsonl"
SPLITS = ("train", "val", "test")  # sub-folders


def open_dataset(
    path: str | PathLike[str],
    task: TaskName,
    *,
    split: str | None = None,
    skip_bad: bool = False,
    classes: Sequence[str] | None = None,
) -> RecordDataset:
    """A map-style data set (`vfmk.data.RecordDataset`) from what lies at `path`:

        X.json                  COCO, its images beside it or in a folder that it implies
        X.jsonl                 a manifest (`vfmk.data.folder`)
        JPEGImages, ImageSets   a folder of Pascal VOC segmentation
        annotations/*.json      a folder of COCO; `split` chooses the file, as in
                                instances_train2017.json
        images/ and masks/,     a folder of images and masks (`vfmk.data.folder`), which have no
        or X.jpg with X.png     classes of objects: for promptable and semantic alone
        manifest.jsonl          the folder of a manifest
        train/, val/, test/     a folder of any of these in sub-folders, chosen by `split`

    What headers, JSON and mask files tell is checked here; images are decoded when they are read.

    Args:
        task: "promptable", "semantic", "instance" or "detection".
        split: needed where there are several, so that none is mixed into another.
        skip_bad: leave bad records out, and say why in `.skipped`. Reads every record once.
        classes: names by label, "background" first; as another split has them, for example.

    Raises:
        FileNotFoundError: no such path.
        DataError: a source that is not recognised, has no such split or cannot give this task; a
            bad file or record, unless `skip_bad`; nothing usable left.
        ValueError: an unknown task, or classes that do not fit.
    """
    if task not in TASKS:
        raise ValueError(f"open_dataset: task must be one of {', '.join(TASKS)}, got {task!r}")
    if classes is not None:
        _check_classes(task, classes)
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"open_dataset: {root} does not exist")
    skipped: list[str] | None = [] if skip_bad else None
    records, names = _records(root, task, split, skipped, classes)
    if skip_bad:
        records = _readable(records, skipped)
    if not records:
        reasons = f", the first of {len(skipped)} reasons: {skipped[0]}" if skipped else ""
        raise DataError(f"{root} has no usable record{reasons}")
    return RecordDataset(root if root.is_dir() else root.parent, records, names, skipped or [])


def _check_classes(task: TaskName, classes: Sequence[str]) -> None:
    if task == "promptable":
        raise ValueError("open_dataset: promptable objects have no classes, got classes")
    most = IGNORE if task == "semantic" else math.inf
    if not 2 <= len(classes) <= most or len(set(classes)) < len(classes):
        raise ValueError(
            "open_dataset: classes must be different names, at least 2 and of semantic at most"
            f" {IGNORE}, got {list(classes)}"
        )
    if task != "semantic" and classes[0] != BACKGROUND:
        raise ValueError(f"open_dataset: classes[0] must be {BACKGROUND!r}, got {classes[0]!r}")


def _records(
    path: Path,
    task: TaskName,
    split: str | None,
    skipped: list[str] | None,
    classes: Sequence[str] | None,
) -> tuple[Sequence[Record], list[str]]:
    if path.suffix == ".jsonl":
        return masked_images(pairs_of_manifest(path, split, skipped), task, skipped, classes)
    if path.suffix == ".json":
        if split is not None:
            raise DataError(f"{path} is one file, asked for its split {split!r}")
        return coco_records(path, task, skipped, classes)
    if not path.is_dir():
        raise DataError(f"{path} is neither a folder nor .json (COCO) nor .jsonl (a manifest)")
    if is_voc(path):
        return voc_records(path, task, split, skipped, classes)
    if (path / "annotations").is_dir():
        return coco_records(_annotation_file(path, split), task, skipped, classes)
    if split is not None and (path / split).is_dir():
        return _records(path / split, task, None, skipped, classes)
    if (path / MANIFEST).is_file() and (split is not None or not has_pairs(path)):
        return _records(path / MANIFEST, task, split, skipped, classes)
    if split is None and has_pairs(path):
        return masked_images(pairs_of_folder(path, skipped), task, skipped, classes)
    splits = [name for name in SPLITS if (path / name).is_dir()]
    if splits or split is not None:
        raise DataError(f"{path} has the splits {splits}, asked for {split!r}")
    raise DataError(
        f"{path} is not a data set that is known; looked for JPEGImages/ with "
        f"ImageSets/Segmentation/ (Pascal VOC), annotations/*.json (COCO), images/ with masks/, "
        f"X.jpg beside its mask X.png, {MANIFEST}, and sub-folders {'/, '.join(SPLITS)}/ of these"
    )


def _annotation_file(folder: Path, split: str | None) -> Path:
    """The one JSON of a split, which is its name's last word, with a year or without."""
    files = sorted((folder / "annotations").glob("*.json"))
    fitting = [
        file
        for file in files
        if split is None or re.search(rf"(^|_){re.escape(split)}(\d{{4}})?$", file.stem)
    ]
    instances = [file for file in fitting if file.stem.startswith("instances")] or fitting
    if len(instances) != 1:
        names = [file.name for file in files]
        raise DataError(f"{folder / 'annotations'} has {names}, asked for the split {split!r}")
    return instances[0]


def _readable(records: Sequence[Record], skipped: list[str] | None) -> list[Record]:
    def is_read(record: Record) -> bool:
        record.read()
        return True

    return [record for record, _ in in_threads(is_read, records, "reading every record", skipped)]
