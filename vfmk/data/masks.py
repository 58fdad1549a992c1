"""Mask files: one object brighter than the rest, or an index for each pixel."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vfmk.data.dataset import BACKGROUND, IGNORE, DataError, opened, read_array

OBJECT = "object"


@dataclass(frozen=True)
class MaskMeaning:
    """What the values of a data set's mask files say.

    Binary: the object is brighter than half of its mask's maximum. Indexed: 0 is the background,
    255 is ignored, each other value is a class or an object.
    """

    is_binary: bool
    classes: tuple[str, ...]

    @classmethod
    def of(
        cls, values: set[int], is_palette: bool, classes: Sequence[str] | None = None
    ) -> "MaskMeaning":
        """From all values that occur in all masks, and whether a coloured palette gives them.

        Grey values are indices if two or more occur besides 0 and all but 255 are below 128.

        Raises:
            ValueError: `classes` that do not fit.
        """
        nonzero = values - {0}
        indices = nonzero - {IGNORE}
        is_single = len(nonzero) <= 1 and not is_palette
        if classes is not None and len(classes) != 2:
            if is_single and not indices:
                raise ValueError(f"the masks are binary, 2 classes, got classes={list(classes)}")
            return cls(False, tuple(classes))
        if is_single or (not is_palette and max(indices) >= 128):
            return cls(True, tuple(classes or (BACKGROUND, OBJECT)))
        if classes is None:
            classes = (BACKGROUND, *(f"class {i}" for i in range(1, max(indices, default=0) + 1)))
        return cls(False, tuple(classes))

    def semantic(self, path: Path) -> np.ndarray:
        """uint8 [H, W] of class indices, 255 to ignore."""
        mask, _ = read_mask(path)
        if self.is_binary:
            return (mask > mask.max() / 2).astype(np.uint8)
        unknown = np.unique(mask[(mask >= len(self.classes)) & (mask != IGNORE)])
        if len(unknown):
            raise DataError(
                f"{path} holds class {unknown[0]}, there are {len(self.classes)} (0 to "
                f"{len(self.classes) - 1}, and {IGNORE} to ignore)"
            )
        return mask

    def objects(self, path: Path) -> np.ndarray:
        """bool [n, H, W], n >= 1."""
        mask, _ = read_mask(path)
        if self.is_binary and mask.any():
            return (mask > mask.max() / 2)[None]
        indices = np.setdiff1d(mask, (0, IGNORE))
        if not len(indices):
            raise DataError(f"{path} is empty, expected an object")
        return mask == indices[:, None, None]


def read_mask(path: Path) -> tuple[np.ndarray, bool]:
    """uint8 [H, W], and whether its values are indices into a coloured palette."""
    with opened(path) as file:
        is_palette = file.mode == "P"
        if is_palette and _is_grey(file.getpalette() or []):
            return read_array(path, "L"), False
        is_colour = file.mode in ("RGB", "RGBA", "LA", "PA")
    mask = read_array(path, "RGB") if is_colour else read_array(path)
    if mask.ndim == 3:
        if (mask != mask[..., :1]).any():
            raise DataError(f"{path} is a coloured picture, expected a grey or palette mask")
        mask = mask[..., 0]
    if mask.dtype != np.uint8:
        if mask.min() < 0 or mask.max() > 255:
            raise DataError(f"{path} holds {mask.min()} to {mask.max()}, expected 0 to 255")
        mask = mask.astype(np.uint8)
    return mask, is_palette


def _is_grey(palette: list[int]) -> bool:
    return palette[::3] == palette[1::3] == palette[2::3]
