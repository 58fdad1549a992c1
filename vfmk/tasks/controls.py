"""What a score must be held against before anything is concluded from it.

Three numbers for a model on a set of samples, each from one positive point: the model as it is, the
model with the one mask threshold that suits the training samples best, and a plain disc around the
point with the one radius that suits them best.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vfmk.data.sample import Sample

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

RADII = np.linspace(0.02, 0.6, 30)  # of a disc, as a share of the image's longer side
THRESHOLDS = np.linspace(-8, 8, 65)  # of the mask's logits


class ControlledScore(NamedTuple):
    """Mean IoU on the test samples."""

    model: float
    model_tuned_threshold: float
    disc: float
    threshold: float
    radius: float


class Controls(NamedTuple):
    """What suits the training samples best, and the mean IoU there at that threshold."""

    threshold: float
    radius: float
    tuned_threshold: float


def tuned_controls(sam: "Sam", train: Sequence[Sample]) -> Controls:
    by_threshold, by_radius = [], []  # IoU, a row for each sample
    for sample in train:
        logits = predict_logits(sam, sample)
        by_threshold.append([binary_iou(logits > t, sample.mask) for t in THRESHOLDS])
        by_radius.append([binary_iou(disc(sample, r), sample.mask) for r in RADII])
    of_thresholds, of_radii = np.mean(by_threshold, 0), np.mean(by_radius, 0)
    return Controls(
        threshold=float(THRESHOLDS[of_thresholds.argmax()]),
        radius=float(RADII[of_radii.argmax()]),
        tuned_threshold=float(of_thresholds.max()),
    )


def controlled_score(
    sam: "Sam", train: Sequence[Sample], test: Sequence[Sample]
) -> ControlledScore:
    """Scores `sam` and its controls on `test`; only the controls look at `train`."""
    threshold, radius, _ = tuned_controls(sam, train)
    logits = [predict_logits(sam, sample) for sample in test]
    return ControlledScore(
        model=mean_iou([z > sam.mask_threshold for z in logits], test),
        model_tuned_threshold=mean_iou([z > threshold for z in logits], test),
        disc=mean_iou([disc(s, radius) for s in test], test),
        threshold=threshold,
        radius=radius,
    )


def mean_iou(predicted: Sequence[np.ndarray], samples: Sequence[Sample]) -> float:
    """Mean over samples of the IoU of bool masks [H, W]."""
    pairs = zip(predicted, samples, strict=True)
    return float(np.mean([binary_iou(mask, sample.mask) for mask, sample in pairs]))


def binary_iou(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two bool masks; 0 where the union is empty."""
    union = np.count_nonzero(predicted | truth)
    return np.count_nonzero(predicted & truth) / union if union else 0.0


def disc(sample: Sample, radius: float) -> np.ndarray:
    """A disc around the sample's first point, `radius` times the longer side: bool [H, W]."""
    height, width = sample.mask.shape
    x, y = sample.points[0]
    distance = np.hypot(np.arange(width) - x, (np.arange(height) - y)[:, None])
    return distance <= radius * max(height, width)


@torch.no_grad()
def predict_logits(sam: "Sam", sample: Sample, box: np.ndarray | None = None) -> np.ndarray:
    """Logits of the single mask at the image's own size, from the sample's points or, where one is
    given, from a box (x0, y0, x1, y1) instead: float32 [H, W]."""
    from segment_anything import SamPredictor

    predictor = SamPredictor(sam)
    predictor.set_image(sample.image)
    logits, _, _ = predictor.predict(
        point_coords=sample.points if box is None else None,
        point_labels=sample.labels if box is None else None,
        box=box,
        multimask_output=False,
        return_logits=True,
    )
    return logits[0]
