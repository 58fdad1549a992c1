"""Pascal VOC segmentation: a class index and an object index for every pixel.

    JPEGImages/X.jpg   SegmentationClass/X.png   SegmentationObject/X.png
    ImageSets/Segmentation/SPLIT.txt   the stems of a split, one a line

In both masks 0 is the background and 255 an object's border, which belongs to nothing.
http://host.robots.ox.ac.uk/pascal/VOC/voc2012/
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    boxes_around,
    check_same_size,
    object_targets,
    read_image,
    read_size,
    skipping,
)
from vfmk.data.masks import OBJECT, MaskMeaning, read_mask

CLASSES = (
    BACKGROUND,
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
SETS = Path("ImageSets") / "Segmentation"


@dataclass(frozen=True)
class VocImage:
    """A record of one image and its two masks."""

    image: Path
    class_mask: Path
    object_mask: Path
    image_id: int
    classes: tuple[str, ...]
    task: TaskName

    @property
    def files(self) -> tuple[str, ...]:
        """The image and those masks that the task needs."""
        masks = {"promptable": [self.object_mask], "semantic": [self.class_mask]}
        needed = masks.get(self.task, [self.class_mask, self.object_mask])
        return str(self.image), *map(str, needed)

    def read(self) -> Item:
        image = read_image(self.image)
        size = image.shape[-2:]
        meaning = MaskMeaning(False, self.classes)
        target: Target = {"files": self.files}
        if self.task != "promptable":
            semantic = meaning.semantic(self.class_mask)
            check_same_size(self.class_mask, semantic.shape, self.image, size)
        if self.task == "semantic":
            target["semantic"] = tv_tensors.Mask(torch.from_numpy(semantic))
            return image, target
        masks = meaning.objects(self.object_mask)
        check_same_size(self.object_mask, masks.shape[1:], self.image, size)
        if self.task != "promptable":
            labels = [self._label(semantic, mask) for mask in masks]
            boxes = boxes_around(torch.from_numpy(masks))
            target |= object_targets(boxes, labels, [False] * len(labels), size)
            target["image_id"] = self.image_id
        if self.task != "detection":
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        return image, target

    def _label(self, semantic: np.ndarray, mask: np.ndarray) -> int:
        labels = np.setdiff1d(semantic[mask], (0, IGNORE))
        if len(labels) != 1:
            value = read_mask(self.object_mask)[mask][0]
            raise DataError(
                f"{self.object_mask}: object {value} has the classes {labels.tolist()} in "
                f"{self.class_mask}, expected one"
            )
        return int(labels[0])


def is_voc(folder: Path) -> bool:
    return (folder / "JPEGImages").is_dir() and (folder / SETS).is_dir()


def voc_records(
    folder: Path,
    task: TaskName,
    split: str | None,
    skipped: list[str] | None,
    classes: Sequence[str] | None = None,
) -> tuple[list[Record], list[str]]:
    """Records and class names; `classes` are VOC's own 21 unless given.

    Raises:
        DataError: unless into `skipped`; no such split, or none is asked for.
    """
    lists = sorted(path.stem for path in (folder / SETS).glob("*.txt"))
    if split not in lists:
        raise DataError(f"{folder / SETS} has the splits {lists}, asked for {split!r}")
    listed = folder / SETS / f"{split}.txt"
    try:
        stems = listed.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listed} is unreadable: {error}") from error
    names = tuple(classes or CLASSES)
    records: list[Record] = []
    for image_id, stem in enumerate(stems):
        with skipping(skipped):
            record = VocImage(
                folder / "JPEGImages" / f"{stem}.jpg",
                folder / "SegmentationClass" / f"{stem}.png",
                folder / "SegmentationObject" / f"{stem}.png",
                image_id,
                names,
                task,
            )
            image, *masks = map(Path, record.files)
            size = read_size(image)
            for mask in masks:
                check_same_size(mask, read_size(mask), image, size)
            records.append(record)
    return records, [OBJECT] if task == "promptable" else list(names)
