"""Mask files: one object brighter than the rest, or an index for each pixel."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vfmk.data.dataset import BACKGROUND, IGNORE, DataError, opened

OBJECT = "object"
BRIGHT = 128  # grey values from here to 254 are shades, below it they may be indices


@dataclass(frozen=True)
class MaskValues:
    """What occurs in one mask file."""

    path: Path
    size: tuple[int, int]  # (H, W)
    values: frozenset[int]  # besides 0
    is_palette: bool  # a coloured one

    @classmethod
    def read(cls, path: Path) -> "MaskValues":
        """Raises DataError."""
        mask, is_palette = _load(path)
        counts = mask.histogram()
        values = frozenset(value for value in range(1, 256) if counts[value])
        return cls(path, (mask.height, mask.width), values, is_palette)

    @property
    def is_shaded(self) -> bool:
        """Grey, and too bright for indices."""
        return not self.is_palette and max(self.values - {IGNORE}, default=0) >= BRIGHT

    @property
    def is_indexed(self) -> bool:
        """More is said than object and background."""
        if self.is_palette:
            return bool(self.values - {IGNORE})
        return len(self.values) > 1 and not self.is_shaded


@dataclass(frozen=True)
class MaskMeaning:
    """What the values of mask files say.

    Binary: the object is brighter than half of its mask's maximum. Indexed: 0 is the background,
    255 is ignored, each other value is a class or an object.
    """

    is_binary: bool
    classes: tuple[str, ...]

    @classmethod
    def of(cls, masks: Sequence[MaskValues], classes: Sequence[str] | None = None) -> "MaskMeaning":
        """What mask files that belong together say; `classes` other than two make them indexed.

        They are binary if each has one value besides 0, which is 1, 255 or everywhere the same, or
        if there are shades. Else they are indexed, as with a coloured palette.

        Raises:
            DataError: naming one that looks binary and one that looks indexed.
            ValueError: `classes` that do not fit.
        """
        values = {value for mask in masks for value in mask.values}
        is_palette = any(mask.is_palette for mask in masks)
        if classes is not None and len(classes) != 2:
            if values == {IGNORE} and not is_palette:
                raise ValueError(f"the masks are binary, 2 classes, got classes={list(classes)}")
            return cls(False, tuple(classes))
        shaded = next((mask for mask in masks if mask.is_shaded), None)
        indexed = next((mask for mask in masks if mask.is_indexed), None)
        if shaded is not None:
            # A few soft pixels below a full 255 would look like indices.
            dark = (m for m in masks if m.is_indexed and (m.is_palette or IGNORE not in m.values))
            _refuse_both(shaded, next(dark, None))
        if shaded is not None or (indexed is None and (len(values) < 2 or values == {1, IGNORE})):
            return cls(True, tuple(classes or (BACKGROUND, OBJECT)))
        # Beside an index 255 is to be ignored; all alone it may be an object.
        if not any(mask.values > {IGNORE} for mask in masks):
            white = next((m for m in masks if m.values == {IGNORE} and not m.is_palette), None)
            _refuse_both(white, indexed or next(m for m in masks if m.values - {IGNORE}))
        if classes is None:
            classes = (BACKGROUND, *(f"class {i}" for i in range(1, max(values - {IGNORE}) + 1)))
        return cls(False, tuple(classes))

    def semantic(self, path: Path) -> np.ndarray:
        """uint8 [H, W] of class indices, 255 to ignore."""
        mask = read_mask(path)
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
        mask = read_mask(path)
        if self.is_binary and mask.any():
            return (mask > mask.max() / 2)[None]
        indices = np.setdiff1d(mask, (0, IGNORE))
        if not len(indices):
            raise DataError(f"{path} is empty, expected an object")
        return mask == indices[:, None, None]


def read_mask(path: Path) -> np.ndarray:
    """uint8 [H, W]; of a coloured palette the indices."""
    return np.array(_load(path)[0])


def _load(path: Path) -> tuple[Image.Image, bool]:
    """One byte a pixel, upright, and whether it is an index into a coloured palette."""
    with opened(path) as file:
        mask = ImageOps.exif_transpose(file)
    if mask.mode == "P":
        if not _is_grey(mask.getpalette() or []):
            return mask, True
        mask = mask.convert("L")
    if mask.mode == "L":
        return mask, False
    is_colour = mask.mode in ("RGB", "RGBA", "LA", "PA")
    values = np.array(mask.convert("RGB") if is_colour else mask)
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise DataError(f"{path} is a coloured picture, expected a grey or palette mask")
        values = values[..., 0]
    if not (values.min() >= 0 and values.max() <= 255):
        raise DataError(f"{path} holds {values.min()} to {values.max()}, expected 0 to 255")
    return Image.fromarray(values.astype(np.uint8)), False


def _is_grey(palette: list[int]) -> bool:
    return palette[::3] == palette[1::3] == palette[2::3]


def _refuse_both(binary: MaskValues | None, indexed: MaskValues | None) -> None:
    if binary is not None and indexed is not None:
        shown = [f"{mask.path} holds {_some(mask.values)}" for mask in (binary, indexed)]
        raise DataError(
            f"{shown[0]}, as a binary mask, but {shown[1]}, as indices: convert one kind; "
            "a coloured palette makes indices certain"
        )


def _some(values: frozenset[int], shown: int = 6) -> str:
    listed = sorted(values)
    most = f" to {listed[-1]}" if len(listed) > shown else ""
    return ", ".join(map(str, [0, *listed[:shown]])) + most
