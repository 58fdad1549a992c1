"""Images, each with a mask file, as a folder or as a manifest lists them.

A folder (or its sub-folder `train`, `val` or `test`, as `split` says):

    X.jpg or X.jpeg   the image
    X.png             its mask, see `vfmk.data.masks`
    X.txt             optional: `x,y` of a point on the object, or `x1,y1,x2,y2,x,y` with its box
                      (which is not read)

Images may also lie in `images/` (there .png too) and masks in `masks/`, by the same stems.

A manifest is a JSONL file, a line `{"id","dataset","split","image","mask","points":[[x,y],...],
"labels":[1,...]}` with paths relative to it, of which `image` and `mask` are required.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors

from vfmk.data.dataset import (
    DataError,
    Item,
    Target,
    TaskName,
    check_same_size,
    in_threads,
    read_image,
    read_size,
    skipping,
)
from vfmk.data.masks import OBJECT, MaskMeaning, MaskValues
from vfmk.data.sample import Sample

PAIR_SUFFIXES = {".jpg", ".jpeg"}  # beside their masks, which are .png
IMAGE_SUFFIXES = PAIR_SUFFIXES | {".png", ".bmp", ".tif", ".tiff", ".webp"}


Point = tuple[float, float]  # (x, y)


@dataclass(frozen=True)
class FilePair:
    """An image, its mask, and perhaps points with the place where they are written."""

    image: Path
    mask: Path
    points: tuple[Point, ...] = ()
    labels: tuple[int, ...] = ()  # 1 on the object, 0 off it
    points_source: str = ""
    id: str = ""

    @property
    def point(self) -> Point | None:
        """The first on the object."""
        return next((p for p, label in zip(self.points, self.labels, strict=True) if label), None)


@dataclass(frozen=True)
class MaskedImage:
    """A record of one pair, for the promptable and the semantic task."""

    pair: FilePair
    task: TaskName
    meaning: MaskMeaning

    @property
    def files(self) -> tuple[str, ...]:
        return str(self.pair.image), str(self.pair.mask)

    def read(self) -> Item:
        image = read_image(self.pair.image)
        target: Target = {"files": self.files}
        read = self.meaning.semantic if self.task == "semantic" else self.meaning.objects
        mask = read(self.pair.mask)
        check_same_size(self.pair.mask, mask.shape[-2:], self.pair.image, image.shape[-2:])
        key = "semantic" if self.task == "semantic" else "masks"
        target[key] = tv_tensors.Mask(torch.from_numpy(mask))
        if self.task == "promptable" and self.pair.point is not None:
            target["points"] = self._points(self.pair.point, mask)
        return image, target

    def _points(self, point: tuple[float, float], masks: np.ndarray) -> tv_tensors.KeyPoints:
        """The point for the object that it lies on, NaN for the others."""
        x, y = point
        is_on = masks[:, int(y), int(x)]
        if not is_on.any():
            raise DataError(f"{self.pair.points_source}: ({x}, {y}) is outside the mask")
        points = np.full((len(masks), 2), math.nan, np.float32)
        points[is_on] = x, y
        canvas_size = (masks.shape[1], masks.shape[2])
        return tv_tensors.KeyPoints(torch.from_numpy(points), canvas_size=canvas_size)


def masked_images(
    pairs: Sequence[FilePair],
    task: TaskName,
    skipped: list[str] | None,
    classes: Sequence[str] | None = None,
) -> tuple[list[MaskedImage], list[str]]:
    """Records and class names. Reads every mask once, to learn what its values mean.

    Raises:
        DataError: unless into `skipped`; a task that masks alone do not give, masks of two kinds.
    """
    if task not in ("promptable", "semantic"):
        raise DataError(
            f"{task}: mask files name no instances with classes, expected COCO JSON or Pascal VOC"
        )
    check = partial(_check_pair, task=task)
    checked = list(in_threads(check, pairs, "reading masks", skipped))
    meaning = MaskMeaning.of([values for _, values in checked], classes)
    names = [OBJECT] if task == "promptable" else list(meaning.classes)
    return [MaskedImage(pair, task, meaning) for pair, _ in checked], names


def has_pairs(folder: Path) -> bool:
    """Whether there are `images/` and `masks/`, or an image beside a mask of its stem."""
    if (folder / "images").is_dir() and (folder / "masks").is_dir():
        return True
    return any(
        path.suffix.lower() in PAIR_SUFFIXES and path.with_suffix(".png").exists()
        for path in folder.iterdir()
    )


def pairs_of_folder(folder: Path, skipped: list[str] | None) -> list[FilePair]:
    """Ordered by stem as a string."""
    image_folder, mask_folder, suffixes = folder, folder, PAIR_SUFFIXES
    if (folder / "images").is_dir():
        image_folder, mask_folder, suffixes = folder / "images", folder / "masks", IMAGE_SUFFIXES
    images = [p for p in image_folder.iterdir() if p.suffix.lower() in suffixes]
    if not images:
        raise DataError(f"{image_folder} has no image ({', '.join(sorted(suffixes))})")
    masks = {p.stem: p for p in mask_folder.glob("*.png")} if mask_folder.is_dir() else {}
    pairs: dict[str, FilePair] = {}
    for image in sorted(images, key=lambda p: (p.stem, p.suffix)):
        with skipping(skipped):
            if image.stem not in masks:
                raise DataError(f"{image} has no mask {mask_folder / image.stem}.png")
            if image.stem in pairs:
                raise DataError(f"{image} has the stem of {pairs[image.stem].image}")
            text = image.with_suffix(".txt")
            points, labels = ((_read_point(text),), (1,)) if text.exists() else ((), ())
            pairs[image.stem] = FilePair(
                image, masks[image.stem], points, labels, str(text), image.stem
            )
    stems = {image.stem for image in images}
    for stem, mask in sorted(masks.items()):
        with skipping(skipped):
            if stem not in stems:
                raise DataError(f"{mask} has no image {image_folder / stem} ({sorted(suffixes)})")
    return list(pairs.values())


def pairs_of_manifest(
    path: Path, split: str | None, skipped: list[str] | None, *, mixed: bool = False
) -> list[FilePair]:
    """In the manifest's order; without `split` all lines, of several splits only if `mixed`.

    Raises:
        DataError: unless into `skipped`; no such split, or several and none is asked for.
    """
    lines: list[tuple[str, dict[str, Any]]] = []
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is unreadable: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            with skipping(skipped):
                lines.append((f"{path}:{number}", _parse_line(f"{path}:{number}", line)))
    splits = {str(entry["split"]) for _, entry in lines if "split" in entry}
    ambiguous = split is None and len(splits) > 1 and not mixed
    if ambiguous or (split is not None and split not in splits):
        raise DataError(f"{path} has the splits {sorted(splits)}, asked for {split!r}")
    pairs = []
    for source, entry in lines:
        if split is None or entry.get("split") == split:
            with skipping(skipped):
                points, labels = _points(source, entry)
                image, mask = path.parent / entry["image"], path.parent / entry["mask"]
                id = entry.get("id", image.stem)
                pairs.append(FilePair(image, mask, points, labels, source, id))
    return pairs


def load_samples(
    path: str | PathLike[str], limit: int | None = None, *, split: str | None = None
) -> list[Sample]:
    """Samples of one object an image: of a folder ordered by stem as a string, or of a manifest.

    Where no points are given, the point is the mask's deepest.

    Args:
        path: a folder, or a manifest (`.jsonl`).
        limit: so many at most, the first ones.
        split: of a manifest its lines, by default all; of a folder the sub-folder.

    Raises:
        FileNotFoundError: no such folder, sub-folder or manifest.
        DataError: no image in it; naming the file that is missing, unreadable, or does not fit its
            image, or the manifest's line; a mask that is empty or has several objects; a point
            outside the image, or labelled as on the object and off it.
    """
    source = Path(path)
    if split is not None and source.is_dir():
        source /= split
    if not source.exists():
        raise FileNotFoundError(f"load_samples: {source} does not exist")
    if source.is_dir():
        pairs = pairs_of_folder(source, None)
    else:
        pairs = pairs_of_manifest(source, split, None, mixed=True)
    if not pairs:
        raise DataError(f"{source} lists no image")
    return [sample for _, sample in in_threads(_sample, pairs[:limit], "reading samples", None)]


def _sample(pair: FilePair) -> Sample:
    meaning = MaskMeaning.of([_check_pair(pair, "promptable")])
    image, target = MaskedImage(pair, "promptable", meaning).read()
    if len(target["masks"]) > 1:
        raise DataError(f"{pair.mask} has {len(target['masks'])} objects, expected 1")
    mask = target["masks"][0].numpy()
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    if not pair.points:
        return Sample.with_deepest_point(pair.id, pixels, mask)
    points, labels = np.array(pair.points, np.float32), np.array(pair.labels, np.int64)
    return Sample(pair.id, pixels, mask, points, labels)


def _check_pair(pair: FilePair, task: TaskName) -> MaskValues:
    size = read_size(pair.image)
    mask = MaskValues.read(pair.mask)
    check_same_size(pair.mask, mask.size, pair.image, size)
    for point in pair.points:
        _check_inside(pair.points_source, point, size)
    if task == "promptable" and not mask.values:
        raise DataError(f"{pair.mask} is empty, expected an object")
    return mask


def _read_point(path: Path) -> tuple[float, float]:
    try:
        text = path.read_text().strip()
        numbers = [float(part) for part in text.split(",")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is unreadable: {error}") from error
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 6):
        raise DataError(f"{path} must hold `x,y` or `x1,y1,x2,y2,x,y`, got {text[:60]!r}")
    return numbers[-2], numbers[-1]


def _check_inside(source: str, point: tuple[float, float], size: tuple[int, int]) -> None:
    (x, y), (height, width) = point, size
    if not (0 <= x < width and 0 <= y < height):
        raise DataError(f"{source}: ({x}, {y}) is outside the {width}x{height} image")


def _parse_line(source: str, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{source} is not JSON: {error}") from error
    for key in ("image", "mask"):
        if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
            raise DataError(f"{source} must be an object whose {key!r} is a path")
    return entry


def _points(source: str, entry: dict[str, Any]) -> tuple[tuple[Point, ...], tuple[int, ...]]:
    """A line's points and their labels."""
    points, labels = entry.get("points", []), entry.get("labels", [])
    try:
        if len(points) == len(labels) and all(label in (0, 1) for label in labels):
            return tuple((float(x), float(y)) for x, y in points), tuple(map(int, labels))
    except (TypeError, ValueError, OverflowError):
        pass
    raise DataError(
        f"{source}: points must be [[x, y], ...] with a label 0 or 1 each, "
        f"got points {points} and labels {labels}"
    )
