"""Objects from COCO JSON: boxes, polygons, run lengths and crowds.

Format: https://cocodataset.org/#format-data. Category ids become labels 1 .. K in the order of the
ids, or by name where `classes` are given.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors

from vfmk.data.dataset import (
    BACKGROUND,
    IGNORE,
    DataError,
    Item,
    Record,
    Target,
    TaskName,
    object_targets,
    read_image,
    skipping,
)
from vfmk.data.masks import OBJECT

ROUNDING = 1.0  # pixels by which a box or polygon may pass its image's border, as COCO's own do


@dataclass(frozen=True)
class Annotation:
    id: int
    label: int
    is_crowd: bool
    box: tuple[float, float, float, float] | None  # XYXY
    segmentation: Any  # polygons, or run lengths


@dataclass(frozen=True)
class CocoImage:
    """A record of one image and its annotations."""

    source: Path  # the JSON
    image: Path
    image_id: int
    size: tuple[int, int]  # (H, W)
    annotations: tuple[Annotation, ...]
    task: TaskName

    @property
    def files(self) -> tuple[str, ...]:
        return str(self.image), str(self.source)

    def read(self) -> Item:
        image = read_image(self.image)
        height, width = self.size
        if image.shape[-2:] != self.size:
            raise DataError(
                f"{self.image} is {image.shape[2]}x{image.shape[1]} pixels, "
                f"{self.source} says {width}x{height}"
            )
        target: Target = {"files": self.files}
        if self.task == "semantic":
            target["semantic"] = tv_tensors.Mask(self._semantic())
        elif self.task == "promptable":
            target["masks"] = tv_tensors.Mask(self._masks())
        else:
            boxes = torch.tensor([annotation.box for annotation in self.annotations])
            labels = [annotation.label for annotation in self.annotations]
            crowd = [annotation.is_crowd for annotation in self.annotations]
            target |= object_targets(boxes, labels, crowd, self.size)
            target["image_id"] = self.image_id
            if self.task == "instance":
                target["masks"] = tv_tensors.Mask(self._masks())
        return image, target

    def _masks(self) -> torch.Tensor:
        """bool [n, H, W]"""
        masks = np.zeros((len(self.annotations), *self.size), bool)
        for mask, annotation in zip(masks, self.annotations, strict=True):
            mask[:] = self._mask(annotation)
            if not mask.any():
                raise DataError(f"{self.source}: annotation {annotation.id} covers no pixel")
        return torch.from_numpy(masks)

    def _semantic(self) -> torch.Tensor:
        """uint8 [H, W]; where objects overlap, the smaller is on top."""
        masks = self._masks()
        semantic = torch.zeros(self.size, dtype=torch.uint8)
        for i in masks.sum((1, 2)).argsort(descending=True, stable=True).tolist():
            semantic[masks[i]] = self.annotations[i].label
        return semantic

    def _mask(self, annotation: Annotation) -> np.ndarray:
        """uint8 [H, W]"""
        mask_api = _mask_api()
        segmentation = annotation.segmentation
        if isinstance(segmentation, list):
            return mask_api.decode(mask_api.merge(mask_api.frPyObjects(segmentation, *self.size)))
        counts = segmentation["counts"]
        if isinstance(counts, list):
            return mask_api.decode(mask_api.frPyObjects(segmentation, *self.size))
        return mask_api.decode(segmentation | {"counts": counts.encode()})


def coco_records(
    path: Path,
    task: TaskName,
    skipped: list[str] | None,
    classes: Sequence[str] | None = None,
) -> tuple[list[Record], list[str]]:
    """Records and class names, from the JSON and the names of the image files.

    An image without annotations is background, save for promptable, where it is an error; there,
    crowds are no objects. An annotation that is wrong takes its image with it.

    Raises:
        DataError: unless into `skipped`; a file that is not COCO JSON.
        ImportError: pycocotools is not installed.
    """
    _mask_api()
    content = _load(path)
    labels, names = _labels(path, content["categories"], classes)
    if task == "semantic" and len(names) > IGNORE:
        raise DataError(
            f"{path} has {len(names)} classes with the background, semantic masks at most {IGNORE}"
        )
    by_image = defaultdict(list)
    known = {image["id"] for image in content["images"] if isinstance(image.get("id"), int)}
    for entry in content["annotations"]:
        with skipping(skipped):
            image_id = entry.get("image_id")
            if not isinstance(image_id, int) or image_id not in known:
                raise DataError(
                    f"{path}: annotation {entry.get('id')} is for image {image_id}, "
                    "which is not there"
                )
            by_image[image_id].append(entry)
    ids = Counter(entry["id"] for entry in content["annotations"] if _has_id(entry))
    folder = _image_folder(path, content["images"])
    files = {p.name for p in folder.iterdir()}
    records: list[Record] = []
    seen = set()
    for image in content["images"]:
        with skipping(skipped):
            image_id, name, size = _parse_image(path, image)
            if image_id in seen:
                raise DataError(f"{path}: there are two images {image_id}")
            seen.add(image_id)
            if name not in files and not (folder / name).is_file():
                raise DataError(f"{path}: image {image_id}, {folder / name}, is missing")
            annotations = tuple(
                _parse_annotation(path, entry, size, labels, ids, task)
                for entry in by_image[image_id]
            )
            if task == "promptable":
                annotations = tuple(a for a in annotations if not a.is_crowd)
                if not annotations:
                    raise DataError(f"{path}: image {image_id}, {name}, has no object to prompt")
            records.append(CocoImage(path, folder / name, image_id, size, annotations, task))
    return records, [OBJECT] if task == "promptable" else names


def _mask_api() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(f"COCO needs pycocotools ({error}): pip install vfmk[train]") from error
    return mask


def _load(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is unreadable: {error}") from error
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise DataError(f"{path} is not COCO JSON: it has no list of objects {key!r}")
    return content


def _labels(
    path: Path, categories: list[dict[str, Any]], classes: Sequence[str] | None
) -> tuple[dict[int, int], list[str]]:
    """Category ids to labels, and the names by label."""
    for category in categories:
        if not isinstance(category.get("id"), int) or not isinstance(category.get("name"), str):
            raise DataError(f"{path}: category {category} has no integer id and name")
    categories = sorted(categories, key=lambda category: category["id"])
    ids = [category["id"] for category in categories]
    names = [category["name"] for category in categories]
    if len(set(ids)) < len(ids) or len(set(names)) < len(names):
        raise DataError(f"{path}: a category's id or name occurs twice")
    if classes is None:
        return {id: label for label, id in enumerate(ids, 1)}, [BACKGROUND, *names]
    unknown = [name for name in names if name not in classes[1:]]
    if unknown:
        raise DataError(f"{path}: category {unknown[0]!r} is not among {list(classes[1:])}")
    return {id: list(classes).index(name, 1) for id, name in zip(ids, names, strict=True)}, [
        *classes
    ]


def _image_folder(path: Path, images: list[dict[str, Any]]) -> Path:
    """Where the images lie: beside the JSON or above it, or in a folder of either that is called
    `images` or as the JSON's last words (instances_val2017.json: val2017)."""
    names = [image["file_name"] for image in images if isinstance(image.get("file_name"), str)]
    words = path.stem.split("_")
    children = ["", *("_".join(words[i:]) for i in range(len(words)))]
    folders = [
        parent / images_or_not / child
        for parent in (path.parent, path.parent.parent)
        for images_or_not in ("", "images")
        for child in children
    ]
    for folder in folders:
        if folder.is_dir() and any((folder / name).is_file() for name in names):
            return folder
    looked = ", ".join(str(folder) for folder in folders)
    raise DataError(f"{path}: none of its {len(images)} images is in {looked}")


def _parse_image(path: Path, image: dict[str, Any]) -> tuple[int, str, tuple[int, int]]:
    """Id, file name, (H, W)."""
    size = image.get("height"), image.get("width")
    if not isinstance(image.get("id"), int) or not isinstance(image.get("file_name"), str):
        raise DataError(f"{path}: image {image} has no integer id and file_name")
    if not all(isinstance(side, int) and 0 < side < 2**31 for side in size):
        raise DataError(f"{path}: image {image['id']} has no height and width")
    return image["id"], image["file_name"], (image["height"], image["width"])


def _parse_annotation(
    path: Path,
    entry: dict[str, Any],
    size: tuple[int, int],
    labels: dict[int, int],
    ids: Counter[int],
    task: TaskName,
) -> Annotation:
    name = f"{path}: annotation {entry.get('id')}, of image {entry['image_id']},"
    if not _has_id(entry):
        raise DataError(f"{name} has no integer id")
    if ids[entry["id"]] > 1:
        raise DataError(f"{name} has the id of another annotation")
    category = entry.get("category_id")
    if not isinstance(category, int) or category not in labels:
        raise DataError(f"{name} has the unknown category {category}")
    if entry.get("iscrowd", 0) not in (0, 1):
        raise DataError(f"{name} has iscrowd {entry['iscrowd']}, expected 0 or 1")
    box, segmentation = None, None
    if task in ("instance", "detection"):
        box = _parse_box(name, entry.get("bbox"), size)
    if task != "detection":
        segmentation = entry.get("segmentation")
        _check_segmentation(name, segmentation, size)
    is_crowd = entry.get("iscrowd", 0) == 1
    return Annotation(entry["id"], labels[category], is_crowd, box, segmentation)


def _parse_box(name: str, bbox: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """[x, y, width, height] to XYXY within the image."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_finite, bbox)):
        raise DataError(f"{name} has the bbox {bbox}, expected [x, y, width, height]")
    x, y, box_width, box_height = bbox
    height, width = size
    right, bottom = x + box_width, y + box_height
    if box_width <= 0 or box_height <= 0:
        raise DataError(f"{name} has the degenerate bbox {bbox}")
    is_inside = _is_inside((x, right), width) and _is_inside((y, bottom), height)
    if not is_inside or x >= width or y >= height:
        raise DataError(f"{name} has the bbox {bbox}, outside its {width}x{height} image")
    return max(x, 0.0), max(y, 0.0), min(right, float(width)), min(bottom, float(height))


def _has_id(entry: dict[str, Any]) -> bool:
    return isinstance(entry.get("id"), int)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < math.inf


def _is_inside(coordinates: Sequence[float], length: int) -> bool:
    return min(coordinates) >= -ROUNDING and max(coordinates) <= length + ROUNDING


def _check_segmentation(name: str, segmentation: Any, size: tuple[int, int]) -> None:
    height, width = size
    if isinstance(segmentation, list) and segmentation:
        for polygon in segmentation:
            is_even = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
            if not is_even or not all(map(_is_finite, polygon)):
                raise DataError(f"{name} has a polygon that is no list x1, y1, ... of 3 points")
            if not _is_inside(polygon[::2], width) or not _is_inside(polygon[1::2], height):
                raise DataError(f"{name} has a polygon outside its {width}x{height} image")
        return
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise DataError(f"{name} has no segmentation, neither polygons nor run lengths")
    if segmentation.get("size") != [height, width]:
        raise DataError(
            f"{name} has run lengths of size {segmentation.get('size')}, "
            f"its image is {[height, width]}"
        )
    counts = segmentation["counts"]
    runs: Any = _decompress(counts) if isinstance(counts, str) else counts
    is_list = isinstance(runs, list) and all(isinstance(run, int) and run >= 0 for run in runs)
    # pycocotools would read past the end of a short list.
    if not is_list or sum(runs) != height * width:
        raise DataError(f"{name} has run lengths that do not add up to {height * width} pixels")


def _decompress(counts: str) -> list[int] | None:
    """The run lengths of a COCO string: 5 bits a character from 48 on, bit 5 says that more follow,
    the last's bit 4 is the sign; from the fourth run on, the difference to the run before last."""
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64:
            return None
        value |= (code & 0x1F) << shift
        shift += 5
        if not code & 0x20:
            if code & 0x10:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return None if shift else runs
