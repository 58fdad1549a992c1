"""A folder of images and masks as samples.

    X.jpg or X.jpeg   the image
    X.png             its mask, the object brighter than half of the mask's maximum
    X.txt             optional: `x,y` of a point on the object, or `x1,y1,x2,y2,x,y` with its box
                      (which is not read); without the file the point is the mask's deepest

Images may also lie in `images/` (there .png too) and masks in `masks/`, by the same stems.
"""

from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vfmk.data.sample import Sample, deepest_point


def load_folder(path: str | PathLike[str]) -> list[Sample]:
    """All samples of a folder, ordered by stem as a string.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: naming the file that is missing, unreadable, or does not fit its image.
    """
    folder = Path(path)
    image_folder, mask_folder, suffixes = folder, folder, {".jpg", ".jpeg"}
    if (folder / "images").is_dir():
        image_folder, mask_folder = folder / "images", folder / "masks"
        suffixes = suffixes | {".png"}
    if not image_folder.is_dir():
        raise FileNotFoundError(f"load_folder: {image_folder} is not a folder")
    images = [p for p in image_folder.iterdir() if p.suffix.lower() in suffixes]
    if not images:
        raise FileNotFoundError(
            f"load_folder: {image_folder} has no image ({', '.join(sorted(suffixes))})"
        )
    return [
        _load_sample(image, mask_folder / f"{image.stem}.png")
        for image in sorted(images, key=lambda p: p.stem)
    ]


def _load_sample(image_path: Path, mask_path: Path) -> Sample:
    image = _read(image_path, "RGB")
    if not mask_path.exists():
        raise ValueError(f"load_folder: {image_path} has no mask {mask_path}")
    grey = _read(mask_path, "L")
    if grey.shape != image.shape[:2]:
        raise ValueError(
            f"load_folder: {mask_path} is {grey.shape[1]}x{grey.shape[0]} pixels, "
            f"its image {image.shape[1]}x{image.shape[0]}"
        )
    if not grey.any():
        raise ValueError(f"load_folder: {mask_path} is empty")
    mask = grey > grey.max() / 2
    point_path = image_path.with_suffix(".txt")
    point = _read_point(point_path, mask) if point_path.exists() else deepest_point(mask)
    return Sample(image_path.stem, image, mask, point[None], np.ones(1, np.int64))


def _read(path: Path, mode: str) -> np.ndarray:
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)  # as the camera was held
            return np.array(upright.convert(mode))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"load_folder: {path} is unreadable: {error}") from error


def _read_point(path: Path, mask: np.ndarray) -> np.ndarray:
    text = path.read_text().strip()
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 6):
        raise ValueError(
            f"load_folder: {path} must hold `x,y` or `x1,y1,x2,y2,x,y`, got {text[:60]!r}"
        )
    x, y = numbers[-2:]
    height, width = mask.shape
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"load_folder: {path}: ({x}, {y}) is outside the {width}x{height} image")
    if not mask[int(y), int(x)]:
        raise ValueError(f"load_folder: {path}: ({x}, {y}) is outside the mask")
    return np.array([x, y], np.float32)
