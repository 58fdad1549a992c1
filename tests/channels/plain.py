"""The search written out: one candidate and one image at a time, through SamPredictor."""

import itertools
from typing import NamedTuple

import torch
from segment_anything import SamPredictor

from vfmk.tasks.controls import binary_iou


def plain_scores(sam, samples, sets, sequential=False):
    """Mean IoU of each set of pairs: float64."""
    predictor, totals = SamPredictor(sam), torch.zeros(len(sets), dtype=torch.float64)
    for sample in samples:
        predictor.set_image(sample.image)
        totals += predicted_ious(sam, sample, predictor.features.clone(), sets, sequential)
    return totals / len(samples)


def predicted_ious(sam, sample, features, sets, sequential=False):
    """IoU of each set of pairs on one sample, whose features are given."""
    predictor, ious = SamPredictor(sam), torch.zeros(len(sets), dtype=torch.float64)
    size = predictor.transform.get_preprocess_shape(*sample.mask.shape, sam.image_encoder.img_size)
    predictor.original_size, predictor.input_size = sample.mask.shape, size
    predictor.is_image_set = True
    for k, pairs in enumerate(sets):
        predictor.features = features.clone()
        for i, j in pairs:
            source = predictor.features if sequential else features
            predictor.features[:, i] = source[:, j]
        masks, _, _ = predictor.predict(sample.points, sample.labels, multimask_output=False)
        ious[k] = binary_iou(masks[0], sample.mask)
    return ious


def subsets_of(candidates):
    """The smaller first, then in the candidates' order."""
    sizes = range(1, len(candidates) + 1)
    return [s for size in sizes for s in itertools.combinations(candidates, size)]


class Protocol(NamedTuple):
    singles: torch.Tensor
    candidates: list
    best: tuple
    best_score: float


def plain_protocol(sam, samples, channels, top_n):
    pairs = list(itertools.permutations(range(channels), 2))
    baseline, *scores = plain_scores(sam, samples, [(), *((pair,) for pair in pairs)]).tolist()
    singles = torch.full((channels, channels), baseline, dtype=torch.float64)
    singles[tuple(zip(*pairs, strict=True))] = torch.tensor(scores, dtype=torch.float64)
    by_channel = {}
    for _, (i, j) in sorted(zip((-score for score in scores), pairs, strict=True)):
        by_channel.setdefault(i, (i, j))
    candidates = list(by_channel.values())[:top_n]
    subsets = subsets_of(candidates)
    of_subsets = zip(plain_scores(sam, samples, subsets).tolist(), subsets, strict=True)
    best_score, best = min(of_subsets, key=lambda one: (-one[0], len(one[1]), sorted(one[1])))
    return Protocol(singles, candidates, best, best_score)
