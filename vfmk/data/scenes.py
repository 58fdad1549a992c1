"""Generated scenes for pretraining the tiny SAM: an image and the exact masks of what is in it.

A scene is a background, one to six objects painted over each other (blobs, ellipses, polygons,
rings, noise level sets, thin strokes), unlabelled clutter, and the faults of a camera. It is a
function of (seed, index) alone, so nothing is stored.

Textures are cut from eight grey photographs bundled with scikit-image and given random colours.
Their licences, as `skimage.data` documents them:

    brick, grass, gravel                 CC0 (CC0Textures; DeviantArt for grass)
    camera, cell, microaneurysms         CC0 by their authors
    clock                                public domain, Stefan van der Walt
    coins                                no known copyright restrictions, Brooklyn Museum

No other photograph is used; in particular none that `vfmk.data.demo_scenes` composes on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

TEXTURES = ("brick", "camera", "cell", "clock", "coins", "grass", "gravel", "microaneurysms")
MAX_OBJECTS = 6
MIN_VISIBLE = 1 / 500  # of the image's area; below it an object is clutter
PIXEL_MEAN = np.array([123.675, 116.28, 103.53], np.float32)  # SAM's, what it sees as padding


@dataclass(frozen=True)
class Scene:
    image: np.ndarray  # uint8 [H, W, 3], RGB
    masks: np.ndarray  # bool [K, H, W], K >= 1: what can be seen of each object


class _Style(NamedTuple):
    """What kind of scene is drawn; ranges are uniform or, of the scale, log-uniform."""

    max_objects: int
    scale: tuple[float, float]  # as a share of the image's side
    centre: tuple[float, float]
    background_variety: tuple[float, float]
    object_variety: tuple[float, float]
    shape_probabilities: tuple[float, ...]  # of _SHAPES


_SCATTERED = _Style(
    max_objects=MAX_OBJECTS,
    scale=(0.06, 0.5),
    centre=(0.05, 0.95),
    background_variety=(0.05, 0.8),
    object_variety=(0.0, 0.5),
    shape_probabilities=(0.32, 0.14, 0.14, 0.05, 0.15, 0.2),
)
_CLOSE_UP = _Style(
    max_objects=1,
    scale=(0.15, 0.5),
    centre=(0.3, 0.7),
    background_variety=(0.0, 0.35),
    object_variety=(0.2, 0.9),
    shape_probabilities=(0.5, 0.15, 0.05, 0.0, 0.3, 0.0),
)


def generate_scene(seed: int, index: int, size: int = 128, *, close_up: bool = False) -> Scene:
    """The scene `index` of the endless set `seed`, `size` x `size` pixels.

    A close-up shows one large object of uneven colour on a plainer ground, as medical pictures do.
    """
    rng = np.random.default_rng((seed, index))
    while True:
        scene = _draw_scene(rng, size, _CLOSE_UP if close_up else _SCATTERED)
        if len(scene.masks):
            return scene


def _draw_scene(rng: np.random.Generator, size: int, style: _Style) -> Scene:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    is_grey = rng.random() < 0.25
    image = _fill(rng, size, _colour(rng), variety=rng.uniform(*style.background_variety))
    masks: list[np.ndarray] = []
    for _ in range(min(rng.geometric(0.35), style.max_objects)):
        field, scale = _shape(rng, x, y, style)
        mask = field > 0
        softness = np.exp(rng.uniform(np.log(0.3), np.log(max(0.5, 0.2 * scale))))
        alpha = rng.uniform(0.6, 1) / (1 + np.exp(-np.clip(field / softness, -30, 30)))
        beneath = image[mask].mean(0) if mask.any() else PIXEL_MEAN
        colour = _contrasting_colour(rng, beneath)
        fill = _fill(rng, size, colour, variety=rng.uniform(*style.object_variety))
        image += alpha[..., None] * (fill - image)
        masks = [m & ~mask for m in masks] + [mask]
    image = _clutter(rng, image)
    image = _camera(rng, image, x, y, is_grey)
    if rng.random() < 0.15:
        inside = _frame(rng, image)
        masks = [m & inside for m in masks]
    masks = [m for m in masks if m.mean() >= MIN_VISIBLE]
    stack = np.stack(masks) if masks else np.zeros((0, size, size), bool)
    return Scene(np.clip(image, 0, 255).round().astype(np.uint8), stack)


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A random colour, more often muted than not: float32 [3] in 0..255."""
    grey = rng.uniform(10, 245)
    saturation = rng.beta(1, 1.5)
    return (grey + saturation * (rng.uniform(0, 255, 3) - grey)).astype(np.float32)


def _contrasting_colour(rng: np.random.Generator, beneath: np.ndarray) -> np.ndarray:
    candidates = [_colour(rng) for _ in range(3)]
    farthest = max(candidates, key=lambda c: float(np.abs(c - beneath).sum()))
    return beneath + rng.uniform(0.3, 1) * (farthest - beneath)


def _smooth_noise(rng: np.random.Generator, size: int, cells: int, octaves: int = 1) -> np.ndarray:
    """Bicubic value noise, `cells` to a side, about -1..1: float32 [size, size]."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        n = min(cells * 2**octave, size) + 1
        grid = Image.fromarray(rng.uniform(-1, 1, (n, n)).astype(np.float32))
        total += np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)) / 2**octave
    return total


@cache
def _photograph(name: str) -> Image.Image:
    try:
        import skimage.data
    except ImportError as error:
        raise ImportError(
            "generated scenes cut their textures from scikit-image's photographs: "
            "pip install vfmk[demo]"
        ) from error
    return Image.fromarray(getattr(skimage.data, name)()).convert("L")


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A cut-out of a photograph at a random scale, spread over 0..1: float32 [size, size]."""
    photograph = _photograph(TEXTURES[rng.integers(len(TEXTURES))])
    side = rng.uniform(0.15, 1) * min(photograph.size)
    left = rng.uniform(0, photograph.width - side)
    top = rng.uniform(0, photograph.height - side)
    box = (left, top, left + side, top + side)
    cut = np.asarray(
        photograph.resize((size, size), Image.Resampling.BILINEAR, box=box), np.float32
    )
    cut = np.rot90(cut, int(rng.integers(4)))
    low, high = np.percentile(cut[::4, ::4], (2, 98))
    return np.clip((cut - low) / max(high - low, 8.0), 0, 1)


def _fill(rng: np.random.Generator, size: int, colour: np.ndarray, variety: float) -> np.ndarray:
    """A surface around one colour: float32 [size, size, 3]. `variety` 0 makes it nearly flat."""
    kind = rng.choice(["texture", "gradient", "noise", "mottled"], p=[0.35, 0.2, 0.25, 0.2])
    if kind == "texture":
        t = _texture(rng, size)
    elif kind == "gradient":
        ramp = np.linspace(0, 1, size, dtype=np.float32)
        across, down = rng.uniform(-1, 1, 2)
        t = 0.5 + across * (ramp - 0.5)[None, :] + down * (ramp - 0.5)[:, None]
    elif kind == "noise":
        t = 0.5 + 0.5 * _smooth_noise(rng, size, int(rng.integers(1, 12)), octaves=3)
    else:
        spots = _smooth_noise(rng, size, int(rng.integers(4, 32)), octaves=2)
        t = 1 / (1 + np.exp(-np.clip(rng.uniform(3, 15) * (spots - rng.uniform(0, 0.5)), -30, 30)))
    other = colour + variety * (_colour(rng) - colour)
    return (colour + (t[..., None] - 0.5) * (other - colour)).astype(np.float32)


def _shape(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, style: _Style
) -> tuple[np.ndarray, float]:
    """A field that is positive inside a random shape, about in pixels, and the shape's scale."""
    size = len(x)
    scale = size * np.exp(rng.uniform(*np.log(style.scale)))
    angle = rng.uniform(0, 2 * np.pi)
    centre_x, centre_y = rng.uniform(*style.centre, 2) * size
    if rng.random() < 0.4:  # warped, so that no outline stays a formula
        cells = int(rng.integers(2, 9))
        reach = rng.uniform(0.05, 0.35) * scale
        x = x + reach * _smooth_noise(rng, size, cells)
        y = y + reach * _smooth_noise(rng, size, cells)
    u = (x - centre_x) * np.cos(angle) + (y - centre_y) * np.sin(angle)
    v = (y - centre_y) * np.cos(angle) - (x - centre_x) * np.sin(angle)
    draw = _SHAPES[rng.choice(len(_SHAPES), p=style.shape_probabilities)]
    return draw(rng, u, v, float(scale)), float(scale)


def _blob(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    order = np.arange(1, rng.integers(3, 14))
    amplitude = rng.uniform(0, 0.35) * rng.normal(size=len(order)) / order ** rng.uniform(0.5, 1.5)
    phase = rng.uniform(0, 2 * np.pi, len(order))
    angles = np.linspace(-np.pi, np.pi, 256)
    outline = 1 + (amplitude * np.cos(angles[:, None] * order + phase)).sum(1)
    v = v / rng.uniform(0.5, 1)
    return scale * np.interp(np.arctan2(v, u), angles, np.maximum(outline, 0.2)) - np.hypot(u, v)


def _ellipse(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    minor = rng.uniform(0.3, 1)
    return (scale - np.hypot(u, v / minor)) * minor


def _polygon(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    sides = int(rng.integers(3, 8))
    normals = 2 * np.pi * (np.arange(sides) + rng.uniform(-0.3, 0.3, sides)) / sides
    distances = scale * rng.uniform(0.4, 1, sides)
    edges = [d - u * np.cos(n) - v * np.sin(n) for n, d in zip(normals, distances, strict=True)]
    return np.minimum.reduce(edges)


def _ring(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    half_width = max(1.0, rng.uniform(0.08, 0.3) * scale)
    return half_width - np.abs(np.hypot(u, v / rng.uniform(0.6, 1)) - scale)


def _level_set(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    noise = _smooth_noise(rng, len(u), int(rng.integers(3, 14)), octaves=3)
    return scale - np.hypot(u, v) + rng.uniform(0.3, 0.9) * scale * noise


def _stroke(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    control = rng.uniform(-1.3, 1.3, (4, 2)) * scale  # of a cubic Bezier curve
    t = np.linspace(0, 1, 13)[:, None]
    curve = (
        (1 - t) ** 3 * control[0]
        + 3 * t * (1 - t) ** 2 * control[1]
        + 3 * t**2 * (1 - t) * control[2]
        + t**3 * control[3]
    ).astype(np.float32)
    nearest = np.full_like(u, np.inf)  # squared distance to the curve's chords
    for start, end in pairwise(curve):
        chord = end - start
        along = ((u - start[0]) * chord[0] + (v - start[1]) * chord[1]) / max(chord @ chord, 1e-6)
        along = np.clip(along, 0, 1)
        nearest = np.minimum(
            nearest,
            (u - start[0] - along * chord[0]) ** 2 + (v - start[1] - along * chord[1]) ** 2,
        )
    return max(0.9, rng.uniform(0.04, 0.3) * scale) - np.sqrt(nearest)


_Shape = Callable[[np.random.Generator, np.ndarray, np.ndarray, float], np.ndarray]
_SHAPES: tuple[_Shape, ...] = (_blob, _ellipse, _polygon, _ring, _level_set, _stroke)


def _clutter(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Hairs, specks and glints that belong to no object."""
    if rng.random() < 0.5:
        return image
    size = len(image)
    canvas = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    colour = tuple(int(c) for c in _colour(rng))
    for _ in range(rng.integers(0, 10)):
        x0, y0 = rng.uniform(-0.5, 1, 2) * size
        x1, y1 = (x0, y0) + rng.uniform(0.1, 1.2, 2) * size
        start = rng.uniform(0, 360)
        pen.arc((x0, y0, x1, y1), start, start + rng.uniform(20, 120), colour)
    colour = tuple(int(c) for c in _colour(rng))
    for _ in range(rng.integers(0, 12)):
        x0, y0 = rng.uniform(0, 1, 2) * size
        diameter = rng.uniform(1, 4)
        pen.ellipse((x0, y0, x0 + diameter, y0 + diameter), colour)
    return np.asarray(canvas, np.float32)


def _camera(
    rng: np.random.Generator, image: np.ndarray, x: np.ndarray, y: np.ndarray, is_grey: bool
) -> np.ndarray:
    """Uneven light, a vignette, blur, gamma, a lost colour and sensor noise."""
    size = len(image)
    if rng.random() < 0.4:
        image = image * (1 + rng.uniform(0.1, 0.4) * _smooth_noise(rng, size, 2)[..., None])
    if rng.random() < 0.1:
        radius = rng.uniform(0.45, 0.65) * size
        edge = (radius - np.hypot(x - size / 2, y - size / 2)) / rng.uniform(1, 12)
        image = image / (1 + np.exp(-np.clip(edge, -30, 30)))[..., None]
    if rng.random() < 0.3:
        blurred = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
        blurred = blurred.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5)))
        image = np.asarray(blurred, np.float32)
    image = 255 * (np.clip(image, 0, 255) / 255) ** np.exp(rng.normal(0, 0.25))
    if is_grey:
        image = np.repeat(image.mean(-1, keepdims=True), 3, axis=-1)
    return image + rng.exponential(4) * rng.standard_normal(image.shape, np.float32)


def _frame(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Paints flat borders, as letterboxing and SAM's padding leave them; returns what is within."""
    size = len(image)
    inside = np.zeros((size, size), bool)
    top, left = rng.choice(np.array([0, rng.integers(0, size // 5)]), 2)
    bottom, right = size - rng.choice(np.array([0, rng.integers(0, size // 3)]), 2)
    inside[top:bottom, left:right] = True
    flat = [PIXEL_MEAN, np.zeros(3), np.full(3, 255.0)][rng.choice(3, p=[0.6, 0.2, 0.2])]
    image[~inside] = flat
    return inside
