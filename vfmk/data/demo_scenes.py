"""The demo's data set: scanned digits painted on real photographs, so that masks are exact.

Photographs and scans ship inside scikit-image and scikit-learn; nothing is downloaded, and none of
the photographs took part in pretraining (`vfmk.data.scenes`). Train and held-out share neither a
photograph nor a scanned digit.

    astronaut, rocket, hubble_deep_field   public domain (NASA, SpaceX, NASA/ESA)
    chelsea, coffee, retina                CC0 (S. van der Walt, R. Michetti, M. Häggström)
    immunohistochemistry                   no known copyright restrictions (CMMI)
    china.jpg, flower.jpg                  CC BY 2.0, flickr.com/photos/danielbuechele/6061409035
                                           and flickr.com/photos/vultilion/6056698931
    load_digits                            CC BY 4.0, E. Alpaydin and C. Kaynak, UCI repository
"""

from functools import cache
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from vfmk.data.sample import Sample

Split = Literal["train", "held_out"]

PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "train": ("astronaut", "coffee", "rocket", "hubble_deep_field", "china.jpg"),
    "held_out": ("chelsea", "immunohistochemistry", "retina", "flower.jpg"),
}
FIRST_HELD_OUT_DIGIT = 1200  # of the 1,797 scans
THRESHOLD = 6.5  # of the scans' 0..16: where ink ends


def demo_scenes(split: Split, count: int, seed: int = 0, size: int = 256) -> list[Sample]:
    """The first `count` samples of a split."""
    return [demo_scene(split, index, seed, size) for index in range(count)]


def demo_scene(split: Split, index: int, seed: int = 0, size: int = 256) -> Sample:
    """One digit on a square cut-out of a photograph, `size` pixels a side, prompted by the point
    deepest in the digit. A function of its arguments alone."""
    if split not in PHOTOGRAPHS:
        raise ValueError(f"demo_scene: split must be train or held_out, got {split!r}")
    rng = np.random.default_rng((seed, sorted(PHOTOGRAPHS).index(split), index))
    names = PHOTOGRAPHS[split]
    background = _cut_out(rng, _photograph(names[rng.integers(len(names))]), size)
    first, last = (0, FIRST_HELD_OUT_DIGIT) if split == "train" else (FIRST_HELD_OUT_DIGIT, None)
    scans = _digits()[first:last]
    ink = _place(rng, scans[rng.integers(len(scans))], size)
    image = _paint(rng, background, ink)
    return Sample.with_deepest_point(f"{split}-{seed}-{index:04d}", image, ink > THRESHOLD)


@cache
def _photograph(name: str) -> Image.Image:
    try:
        import skimage.data
        import sklearn.datasets
    except ImportError as error:
        raise ImportError(
            "the demo's photographs come with scikit-image and scikit-learn "
            f"({error}): pip install vfmk[demo]"
        ) from error
    if name.endswith(".jpg"):
        return Image.fromarray(sklearn.datasets.load_sample_image(name))
    return Image.fromarray(getattr(skimage.data, name)())


@cache
def _digits() -> np.ndarray:
    """float64 [1797, 8, 8], 0..16."""
    from sklearn.datasets import load_digits

    return load_digits().images


def _cut_out(rng: np.random.Generator, photograph: Image.Image, size: int) -> np.ndarray:
    """A random square of a photograph, perhaps mirrored: float32 [size, size, 3]."""
    side = rng.uniform(0.5, 1) * min(photograph.size)
    left = rng.uniform(0, photograph.width - side)
    top = rng.uniform(0, photograph.height - side)
    box = (left, top, left + side, top + side)
    cut = np.asarray(photograph.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return (cut[:, ::-1] if rng.random() < 0.5 else cut).astype(np.float32)


def _place(rng: np.random.Generator, scan: np.ndarray, size: int) -> np.ndarray:
    """A scan turned, scaled by a cubic spline and set somewhere: float32 [size, size], 0..16."""
    height = rng.uniform(0.3, 0.7) * size
    angle = rng.uniform(-0.4, 0.4)
    scale = len(scan) / height * np.array([1, rng.uniform(1, 1.5)])  # scan pixels for one of ours
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = scale[:, None] * turn
    centre = rng.uniform(0.5 * height, size - 0.5 * height, 2)
    offset = (len(scan) - 1) / 2 - matrix @ centre
    return ndimage.affine_transform(scan, matrix, offset, (size, size), output=np.float32)


def _paint(rng: np.random.Generator, background: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """Blends a paint into `background` where there is ink, lit as the photograph is: uint8."""
    size = len(ink)
    mask = ink > THRESHOLD
    beneath = background[mask].mean(0)
    candidates = rng.uniform(0, 255, (3, 3))
    farthest = candidates[np.abs(candidates - beneath).sum(1).argmax()]
    colour = (beneath + rng.uniform(0.45, 1) * (farthest - beneath)).astype(np.float32)
    light = _resized(_resized(background.mean(-1), 24), size)
    shade = np.clip(light / max(light[mask].mean(), 1), 0.5, 1.5) ** rng.uniform(0, 0.8)
    cells = int(size / rng.uniform(2, 8))
    grain = _resized(rng.standard_normal((cells, cells), np.float32), size)
    paint = colour * (shade * (1 + rng.uniform(0, 0.3) * grain))[..., None]
    softness = rng.uniform(0.3, 1.5)  # in ink levels, of the edge
    alpha = rng.uniform(0.6, 0.95) / (1 + np.exp(-(ink - THRESHOLD) / softness))
    image = background + alpha.astype(np.float32)[..., None] * (paint - background)
    sharp = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    image = np.asarray(sharp.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8))), np.float32)
    image += rng.uniform(0, 6) * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 255).round().astype(np.uint8)


def _resized(plane: np.ndarray, size: int) -> np.ndarray:
    """float32 [H, W] -> float32 [size, size], bicubic."""
    return np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC))
