"""What people would rather look at than read."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from vfmk._files import write_whole
from vfmk.data.sample import Sample
from vfmk.tasks.controls import binary_iou

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure


def draw_grid(
    path: Path,
    samples: Sequence[Sample],
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
) -> None:
    """A row for each sample: image with its points, truth, mask before, mask after."""
    figure, rows = pyplot.subplots(
        len(samples), 4, figsize=(8, 2.1 * len(samples)), squeeze=False, layout="constrained"
    )
    for row, sample, old, new in zip(rows, samples, before, after, strict=True):
        titles = (
            "image",
            "truth",
            f"before, IoU {binary_iou(old, sample.mask):.2f}",
            f"after, IoU {binary_iou(new, sample.mask):.2f}",
        )
        for axes, title, mask in zip(row, titles, (None, sample.mask, old, new), strict=True):
            axes.imshow(sample.image if mask is None else _overlaid(sample.image, mask))
            axes.set_title(title, fontsize=8)
            axes.set_axis_off()
        for point, label in zip(sample.points, sample.labels, strict=True):
            colour = "lime" if label else "red"
            row[0].plot(*point, marker="*", color=colour, markeredgecolor="black")
    _save(figure, path)


def draw_predictions(
    path: Path, rows: Sequence[tuple[Tensor, Sequence[dict[str, Any]]]], classes: Sequence[str]
) -> None:
    """A row for each image [3, H, W]: itself, then upon it its truth, what was predicted before
    and after, each with any of "semantic", "masks", "boxes" and "labels"."""
    titles = ("image", "truth", "before", "after")
    figure, grid = pyplot.subplots(
        len(rows), len(titles), figsize=(8, 2.1 * len(rows)), squeeze=False, layout="constrained"
    )
    for axes_row, (image, shown) in zip(grid, rows, strict=True):
        for axes, title, result in zip(axes_row, titles, ({}, *shown), strict=True):
            axes.imshow(_coloured(torch.as_tensor(image), result, classes).permute(1, 2, 0).numpy())
            axes.set_title(title, fontsize=8)
            axes.set_axis_off()
    _save(figure, path)


def draw_loss(path: Path, losses: Sequence[float]) -> None:
    """The loss of every step, and its mean over a tenth of them."""
    window = max(1, len(losses) // 10)
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(losses, linewidth=0.6, alpha=0.5, label="each step")
    axes.plot(np.arange(window - 1, len(losses)), mean, label=f"mean of {window} steps")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    _save(figure, path)


def _overlaid(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image in grey, the mask in colour upon it."""
    grey = np.repeat(image.mean(-1, keepdims=True), 3, axis=-1) / 255
    colour = np.array([1.0, 0.35, 0.1])
    return np.where(mask[..., None], 0.35 * grey + 0.65 * colour, grey)


def draw_gains(path: Path, gains: np.ndarray) -> None:
    """How many pairs gain how much: a histogram of [C, C], less the diagonal and what is NaN."""
    off_diagonal = gains[~np.eye(len(gains), dtype=bool)]
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axes.hist(off_diagonal[~np.isnan(off_diagonal)], bins=100, log=True)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("gain in IoU")
    axes.set_ylabel("pairs of channels")
    _save(figure, path)


def draw_heat_map(path: Path, gains: np.ndarray) -> None:
    """Gain by channel overwritten and channel read, [C, C]; grey where it is NaN."""
    most = np.nanmax(np.abs(gains)) or 1
    colours = pyplot.get_cmap("RdBu_r").with_extremes(bad="0.8")
    figure, axes = pyplot.subplots(figsize=(6, 5), layout="constrained")
    image = axes.imshow(gains, cmap=colours, vmin=-most, vmax=most, interpolation="nearest")
    axes.set_xlabel("channel read")
    axes.set_ylabel("channel overwritten")
    figure.colorbar(image, label="gain in IoU")
    _save(figure, path, dpi=200)


def _save(figure: Figure, path: Path, dpi: int = 110) -> None:
    png = io.BytesIO()
    figure.savefig(png, dpi=dpi)
    pyplot.close(figure)
    write_whole(path, png.getvalue())


def _coloured(image: Tensor, result: dict[str, Any], classes: Sequence[str]) -> Tensor:
    """uint8 [3, H, W]: masks and classes as colours, boxes with their names; of predictions those
    that have at least half the certainty."""
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    drawn = image
    keep = torch.as_tensor(result["scores"]) >= 0.5 if "scores" in result else slice(None)
    if "semantic" in result:
        semantic = torch.as_tensor(result["semantic"])
        masks = semantic == torch.arange(len(classes))[:, None, None]
        drawn = draw_segmentation_masks(drawn, masks, alpha=0.6, colors=_palette(len(classes)))
    if "masks" in result:
        masks = torch.as_tensor(result["masks"])[keep]
        if len(masks):
            drawn = draw_segmentation_masks(drawn, masks, alpha=0.6, colors=_palette(len(masks)))
    if "boxes" in result:
        boxes, labels = (torch.as_tensor(result[key])[keep] for key in ("boxes", "labels"))
        if len(boxes):
            names = [classes[int(label)] for label in labels]
            colours = [_palette(len(classes))[int(label)] for label in labels]
            drawn = draw_bounding_boxes(drawn, boxes, names, colours)
    return drawn


def _palette(count: int) -> list[tuple[int, int, int]]:
    colours = pyplot.get_cmap("hsv")(np.arange(count) / max(1, count))
    return [(int(255 * r), int(255 * g), int(255 * b)) for r, g, b, _ in colours]
