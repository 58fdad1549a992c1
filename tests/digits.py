"""A small data set on disk: scanned digits painted on real photographs, so that masks are exact.

Photographs and scans are those of `vfmk.data.demo_scenes`, and training and held-out data share
none. Each picture has a 0 on one half and a 1 on the other, each in a colour of its own so that a
few steps tell them apart; widths differ.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import skimage.data
from PIL import Image
from pycocotools import mask as mask_api
from skimage.measure import find_contours
from sklearn.datasets import load_digits, load_sample_image

PHOTOGRAPHS = {"train": ("astronaut", "coffee", "rocket"), "held_out": ("chelsea", "flower.jpg")}
CLASSES = ("zero", "one")
SIZE = 128  # the tiny SAM's
FIRST_HELD_OUT_DIGIT = 1200  # of the 1,797 scans
INK = 0.25
PAINTS = np.array([[190.0, 255, 0], [255, 0, 200]])  # of zeros and ones
COLOURS = [value for i in range(256) for value in (i * 37 % 256, i * 91 % 256, i * 53 % 256)]


class Picture(NamedTuple):
    name: str
    image: np.ndarray  # uint8 [H, W, 3]
    masks: np.ndarray  # bool [2, H, W]
    digits: tuple[int, int]


def pictures(split: str, count: int) -> Iterator[Picture]:
    rng = np.random.default_rng(sorted(PHOTOGRAPHS).index(split))
    scans = load_digits()
    own = np.arange(len(scans.target)) >= FIRST_HELD_OUT_DIGIT
    own = own if split == "held_out" else ~own
    for index in range(count):
        width = (SIZE, 112)[index % 2]
        image = _cut_out(rng, PHOTOGRAPHS[split][index % len(PHOTOGRAPHS[split])], width)
        digits = (0, 1) if rng.random() < 0.5 else (1, 0)
        masks = np.zeros((2, SIZE, width), bool)
        for place, (mask, digit) in enumerate(zip(masks, digits, strict=True)):
            chosen = rng.choice(np.flatnonzero(own & (scans.target == digit)))
            ink = _place(rng, scans.images[chosen] / 16, place * width // 2, width)
            mask[:] = ink > INK
            alpha = (2 * ink).clip(0, 1)[..., None]
            image = image + alpha * (PAINTS[digit] - image)
        name = f"{split}-{index:03}"
        yield Picture(name, image.clip(0, 255).astype(np.uint8), masks, digits)


def _cut_out(rng: np.random.Generator, name: str, width: int) -> np.ndarray:
    """float64 [SIZE, width, 3]"""
    is_sample = name.endswith(".jpg")
    pixels = load_sample_image(name) if is_sample else getattr(skimage.data, name)()
    photograph = Image.fromarray(pixels)
    height = rng.uniform(0.5, 1) * min(photograph.size)
    left = rng.uniform(0, photograph.width - height)
    top = rng.uniform(0, photograph.height - height)
    box = (left, top, left + height * width / SIZE, top + height)
    return np.asarray(photograph.resize((width, SIZE), box=box), np.float64)


def _place(rng: np.random.Generator, scan: np.ndarray, left: int, width: int) -> np.ndarray:
    """A scan enlarged, somewhere in one half: float64 [SIZE, width]."""
    side = int(rng.integers(44, 56))
    large = np.asarray(Image.fromarray(scan.astype(np.float32)).resize((side, side)))
    ink = np.zeros((SIZE, width))
    x = left + rng.integers(0, width // 2 - side + 1)
    y = rng.integers(0, SIZE - side + 1)
    ink[y : y + side, x : x + side] = large
    return ink


def write_triples(root: Path, split: str, count: int) -> Path:
    """X.jpg, X.png, a binary mask of one digit, and for every other X.txt, a point on it."""
    folder = root / split
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures(split, count)):
        mask = picture.masks[index // 2 % 2]
        Image.fromarray(picture.image).save(folder / f"{picture.name}.jpg", quality=95)
        Image.fromarray(mask).save(folder / f"{picture.name}.png")
        if index % 2:
            y, x = np.argwhere(mask)[mask.sum() // 2]
            (folder / f"{picture.name}.txt").write_text(f"{x},{y}\n")
    return folder


def write_palette_masks(root: Path, split: str, count: int) -> Path:
    """images/X.jpg and masks/X.png, 1 for zeros and 2 for ones."""
    for folder in ("images", "masks"):
        (root / split / folder).mkdir(parents=True)
    for picture in pictures(split, count):
        Image.fromarray(picture.image).save(root / split / "images" / f"{picture.name}.jpg")
        labels = [digit + 1 for digit in picture.digits]
        _save_palette(root / split / "masks" / f"{picture.name}.png", picture.masks, labels)
    return root / split


def write_voc(root: Path, counts: dict[str, int]) -> Path:
    """Pascal VOC, a list for each split; zeros are its class 1, ones its class 2."""
    kinds = ("JPEGImages", "SegmentationClass", "SegmentationObject", "ImageSets/Segmentation")
    images, classes, objects, lists = (root / kind for kind in kinds)
    for folder in (images, classes, objects, lists):
        folder.mkdir(parents=True)
    for split, count in counts.items():
        names = []
        for picture in pictures(split, count):
            names.append(picture.name)
            Image.fromarray(picture.image).save(images / f"{picture.name}.jpg")
            labels = [digit + 1 for digit in picture.digits]
            _save_palette(classes / f"{picture.name}.png", picture.masks, labels)
            _save_palette(objects / f"{picture.name}.png", picture.masks, [1, 2])
        (lists / f"{split}.txt").write_text("\n".join(names))
    return root


def write_coco(root: Path, counts: dict[str, int]) -> Path:
    """annotations/instances_SPLIT.json and SPLIT/X.jpg: zeros as run lengths, for their hole, ones
    as polygons."""
    (root / "annotations").mkdir(parents=True)
    for split, count in counts.items():
        (root / split).mkdir()
        images, annotations = [], []
        for image_id, picture in enumerate(pictures(split, count), 1):
            height, width = picture.masks.shape[1:]
            file_name = f"{picture.name}.jpg"
            Image.fromarray(picture.image).save(root / split / file_name)
            images.append(
                {"id": image_id, "file_name": file_name, "height": height, "width": width}
            )
            for mask, digit in zip(picture.masks, picture.digits, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": 10 * (digit + 1),
                        "bbox": _box(mask),
                        "segmentation": _polygons(mask) if digit else _run_lengths(mask),
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        path = root / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))
    return root


def _save_palette(path: Path, masks: np.ndarray, labels: list[int]) -> None:
    indices = (masks * np.array(labels)[:, None, None]).max(0).astype(np.uint8)
    file = Image.fromarray(indices)
    file.putpalette(COLOURS)
    file.save(path)


def _box(mask: np.ndarray) -> list[int]:
    """[x, y, width, height]"""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


def _run_lengths(mask: np.ndarray) -> dict[str, object]:
    encoded = mask_api.encode(np.asfortranarray(mask.view(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def _polygons(mask: np.ndarray) -> list[list[float]]:
    """Outlines in pixels, whose first pixel's centre is at 0.5."""
    outlines = find_contours(np.pad(mask, 1).astype(float), 0.5)
    bound = np.array(mask.shape[::-1])
    return [(outline[:, ::-1] - 0.5).clip(0, bound).ravel().tolist() for outline in outlines]
