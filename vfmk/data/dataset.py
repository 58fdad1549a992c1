"""What every source of data becomes: records that are read when asked for, one image each."""

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision import tv_tensors

TaskName = Literal["promptable", "semantic", "instance", "detection"]
TASKS: tuple[str, ...] = get_args(TaskName)
IGNORE = 255  # in semantic masks: no class, not scored
BACKGROUND = "background"
THREADS = 8  # that read files while a data set is opened
# What Pillow raises on broken files.
BROKEN = (OSError, SyntaxError, EOFError, ValueError, struct.error, Image.DecompressionBombError)
LONG = 200  # records, from which reading them all shows its progress

Target = dict[str, Any]
Item = tuple[tv_tensors.Image, Target]
Input = TypeVar("Input")
Output = TypeVar("Output")


class DataError(ValueError):
    """A file or record that a data set cannot use; the message names both."""


class Record(Protocol):
    @property
    def files(self) -> tuple[str, ...]:
        """The paths that the record is read from."""

    def read(self) -> Item:
        """Raises DataError."""


class RecordDataset(Dataset[Item]):
    """A map-style data set; `dataset[i]` is `(image, target)`, `image` uint8 [3, H, W].

    `target["files"]` is a tuple of paths. Beside it, by task:

        promptable   "masks"     bool [n, H, W], n >= 1
                     "points"    float32 [n, 2], (x, y) on each object, NaN where there is none;
                                 only if the record has any
        semantic     "semantic"  uint8 [H, W], 0 .. len(classes) - 1, 255 to ignore
        instance     "boxes"     float32 [n, 4], XYXY in pixels
                     "labels"    int64 [n], 1 .. len(classes) - 1; 0 is the background
                     "masks"     bool [n, H, W]
                     "iscrowd"   bool [n]
                     "image_id"  int
        detection    as instance, without masks

    Images, masks, boxes and points are `torchvision.tv_tensors`.

    Attributes:
        classes: names by index; the first is "background", save for ["object"] of promptable.
        skipped: why records were left out, one line each; filled by `skip_bad` alone.
    """

    def __init__(
        self, root: Path, records: Sequence[Record], classes: Sequence[str], skipped: Sequence[str]
    ) -> None:
        self.root = root
        self.records = records
        self.classes = list(classes)
        self.skipped = list(skipped)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Item:
        """Raises DataError: a file that is unreadable or does not fit the others."""
        return self.records[index].read()


def digest(dataset: RecordDataset) -> str:
    """SHA-256, in hex, of the classes and of every record's file names and sizes in bytes.

    Files are not read: a change that keeps a file's size is not seen. The folder's own name and
    place do not enter.
    """
    sizes: dict[str, int] = {}
    lines = [repr(dataset.classes)]
    for record in dataset.records:
        for file in record.files:
            if file not in sizes:
                sizes[file] = Path(file).stat().st_size
            path = Path(file)
            if path.is_relative_to(dataset.root):
                path = path.relative_to(dataset.root)
            lines.append(f"{path.as_posix()} {sizes[file]}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def skipping(skipped: list[str] | None) -> Iterator[None]:
    """What goes wrong inside is added to `skipped`; without that list it is raised."""
    try:
        yield
    except DataError as error:
        if skipped is None:
            raise
        skipped.append(str(error))


def in_threads(
    function: Callable[[Input], Output],
    items: Sequence[Input],
    description: str,
    skipped: list[str] | None,
) -> Iterator[tuple[Input, Output]]:
    """Items in order with what the function gives for them, `skipping` those where it fails; with
    a bar on the terminal's stderr where they are many. Pillow decodes outside Python's lock."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        futures = [pool.submit(function, item) for item in items]
        for item, future in _with_progress(list(zip(items, futures, strict=True)), description):
            with skipping(skipped):
                yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _with_progress(items: Sequence[Any], description: str) -> Iterator[Any]:
    if len(items) < LONG:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description, console=Console(stderr=True), transient=True)


def read_image(path: Path) -> tv_tensors.Image:
    """uint8 [3, H, W], RGB, upright as the camera was held."""
    with opened(path) as file:
        if file.mode[0] in "IF":
            raise DataError(
                f"{path} has {file.mode} pixels, expected 8 bits a channel: convert it first"
            )
        pixels = np.array(ImageOps.exif_transpose(file).convert("RGB"))
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))


def read_size(path: Path) -> tuple[int, int]:
    """(H, W) of an upright image, from its header."""
    with opened(path) as file:
        exif = Image.Exif()
        exif.load(file.info.get("exif", b""))
        is_turned = exif.get(0x0112, 1) >= 5  # orientation: a quarter turn is among it
        return (file.width, file.height) if is_turned else (file.height, file.width)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file, of which every fault, here or in the block, is a DataError."""
    try:
        with Image.open(path) as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except DataError:
        raise
    except BROKEN as error:
        raise DataError(f"{path} is unreadable: {error}") from error


def check_same_size(
    path: Path, size: tuple[int, ...], image: Path, image_size: tuple[int, ...]
) -> None:
    """Sizes are (H, W)."""
    if tuple(size) != tuple(image_size):
        raise DataError(
            f"{path} is {size[1]}x{size[0]} pixels, "
            f"its image {image_size[1]}x{image_size[0]} ({image})"
        )


def object_targets(
    boxes: torch.Tensor, labels: Sequence[int], iscrowd: Sequence[bool], size: tuple[int, ...]
) -> Target:
    """`boxes` float [n, 4] XYXY; `size` (H, W)."""
    canvas_size = (size[0], size[1])
    return {
        "boxes": tv_tensors.BoundingBoxes(
            boxes.reshape(len(labels), 4).float(), format="XYXY", canvas_size=canvas_size
        ),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "iscrowd": torch.tensor(iscrowd, dtype=torch.bool),
    }


def boxes_around(masks: torch.Tensor) -> torch.Tensor:
    """bool [n, H, W] -> float32 [n, 4], XYXY around whole pixels; zeros around an empty mask."""
    boxes = masks.new_zeros((len(masks), 4), dtype=torch.float32)
    for box, mask in zip(boxes, masks, strict=True):
        x, y = mask.any(0).nonzero(), mask.any(1).nonzero()
        if len(x):
            box[:] = torch.stack([x[0, 0], y[0, 0], x[-1, 0] + 1, y[-1, 0] + 1])
    return boxes
