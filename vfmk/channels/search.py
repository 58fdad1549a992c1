"""The search for better channels, by inference alone.

Source: Redundancy Elimination for Vision Foundation Models (AAAI 2026, arXiv 2504.08915): score
every pair of channels, keep the best few, score all their subsets, keep the best.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vfmk.channels.channel_map import ChannelMap, Pair
from vfmk.channels.digest import digest_of_model, digest_of_samples, modules_of, name_of
from vfmk.channels.records import PairSet, Records
from vfmk.channels.scorers import FeatureScorer, SamScorer, Scorer
from vfmk.channels.scoring import Scoring, agreed, rank
from vfmk.channels.screening import Group, Place, explore
from vfmk.sam.adapt import AdaptedSam

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

STRATEGIES = ("exhaustive", "screened")
SCREENED_SUBSETS = 128  # how many "screened" scores; all, if there are no more


@dataclass(frozen=True)
class SearchResult:
    """What `search` found.

    Attributes:
        baseline: the frozen model's score.
        singles: float64 [C, C], the score of each pair: row i overwritten, column j read. The
            diagonal is the baseline; NaN where "screened" did not score.
        candidates: the Top-N pairs, best first.
        best: the map of the best subset; under `sequential` the one that does at once what its
            pairs do in order.
        best_score: its score.
        passes: decoder passes spent: one for each set of pairs and sample, three for a gradient.
        audit: with `audit`, the pairs that "screened" passed over although they score above the
            worst candidate, of those looked at.
    """

    baseline: float
    singles: Tensor
    candidates: list[Pair]
    best: ChannelMap
    best_score: float
    passes: int
    audit: list[Pair] | None = None


def search(
    model: nn.Module | Callable[[Tensor], Tensor],
    samples: Sequence[Any],
    *,
    top_n: int = 10,
    strategy: str = "exhaustive",
    score_fn: Callable[[Tensor, Any], Tensor] | None = None,
    sequential: bool = False,
    positive_only: bool = False,
    keep: float = 0.08,
    audit: int = 0,
    output: str | PathLike[str] | None = None,
    progress: bool = True,
) -> SearchResult:
    """Find the channels of a frozen encoder that are better overwritten by others.

    The score of a set of pairs is its mean over `samples`; for a SAM the IoU of the single mask for
    a sample's points, at the image's own size, 0 where mask and prediction are both empty.
    "exhaustive" scores all C·(C − 1) pairs, takes the `top_n` best with at most one for each
    overwritten channel, and scores their 2^N − 1 subsets: the published protocol, number by number.
    "screened" scores the share `keep` of the pairs and 128 of the subsets, the ones that promise
    most by a first-order estimate (one gradient a sample gives all) and by what was scored before
    of their like; its scores are exact, but a good pair may be missed.

    Every sample is encoded once. With torch.distributed initialised the work is shared out, and
    each process gets the same result.

    Args:
        model: a `segment_anything` Sam or an AdaptedSam, as it is (accelerated, with LoRA, …); with
            `score_fn` any encoder: `model(sample.image[None])`, the image moved to its device,
            gives features [1, C, h, w], or [1, N, C] or [1, C] with the channels last.
        samples: from `load_samples`; with `score_fn` anything with an `image`, a tensor.
        top_n: pairs whose subsets are scored, 1 to 16.
        score_fn: `score_fn(features, sample)`, for features of K sets of pairs at once, gives a
            float tensor [K], more being better. "screened" needs its gradient.
        sequential: apply the pairs of a subset one after the other, as the authors' early scripts
            do, instead of all at once.
        positive_only: take no candidate that scores below the frozen model.
        keep: the share of the pairs that "screened" scores, in (0, 1].
        audit: score so many of the pairs that "screened" passed over, drawn at random.
        output: a JSONL file of scores in the authors' format. If it exists the search goes on where
            it ended; it is locked while the search runs.
        progress: report to stderr.

    Raises:
        TypeError: a model that is no SAM, without a score_fn.
        ValueError: no samples, an empty mask, an argument out of range; an output that another run
            holds, or that is of another model, samples or options.

    Example, a DINOv2 of `transformers` and the accuracy of a linear head on its tokens::

        class Tokens(torch.nn.Module):
            def __init__(self, backbone):
                super().__init__()
                self.backbone = backbone

            def forward(self, image):  # [1, 3, H, W] → [1, N, C]
                return self.backbone(image).last_hidden_state

        def accuracy(features, sample):  # [K, N, C] → [K]
            return (head(features[:, 0]).argmax(-1) == sample.label).float()

        result = search(Tokens(backbone), samples, score_fn=accuracy)

    or the depth of every patch, held against `sample.depth` [N]::

        def negative_mse(features, sample):
            return -(depth_head(features[:, 1:])[..., 0] - sample.depth).square().mean(1)
    """
    _check_arguments(samples, top_n, strategy, keep, audit)
    path, run = None, {}
    if output and rank() == 0:
        path = Path(output)
        run = {
            "model": digest_of_model(model),
            "samples": digest_of_samples(samples),
            "score": "IoU" if score_fn is None else name_of(score_fn),
            "sequential": sequential,
        }
    records = Records(path, run, len(samples))
    try:
        with _in_eval_mode(model):
            scorer: Scorer = (
                SamScorer(_sam_of(model)) if score_fn is None else FeatureScorer(model, score_fn)
            )
            scoring = Scoring(scorer, samples, records, sequential, progress)
            return _search(scoring, top_n, strategy, positive_only, keep, audit)
    finally:
        records.close()


def _search(
    scoring: Scoring, top_n: int, strategy: str, positive_only: bool, keep: float, audit: int
) -> SearchResult:
    (baseline,) = scoring.score([()], scoring.report("frozen model", 1))
    if strategy == "screened":
        singles = _screened_pairs(scoring, baseline, keep)
    else:
        singles = _all_pairs(scoring, baseline)
    candidates = _top(singles, top_n, baseline if positive_only else -torch.inf)
    subsets: list[PairSet] = [
        subset
        for size in range(1, len(candidates) + 1)
        for subset in itertools.combinations(candidates, size)
    ]
    if strategy == "screened" and len(subsets) > SCREENED_SUBSETS:
        scores = _screened_subsets(scoring, baseline, candidates, subsets)
    else:
        report = scoring.report("subsets", len(subsets))
        scores = dict(zip(subsets, scoring.score(subsets, report), strict=True))
        report.close()
    best = min(scores, key=lambda pairs: (-scores[pairs], len(pairs), pairs), default=())
    return SearchResult(
        baseline,
        singles,
        candidates,
        scoring.map_of(best),
        scores.get(best, baseline),
        scoring.passes,
        _audited(scoring, singles, candidates, audit) if audit else None,
    )


def _all_pairs(scoring: Scoring, baseline: float) -> Tensor:
    """`SearchResult.singles`."""
    channels = scoring.num_channels
    singles = torch.full((channels, channels), baseline, dtype=torch.float64)
    pairs = list(itertools.permutations(range(channels), 2))
    report = scoring.report("pairs", len(pairs))
    scores = scoring.score([(pair,) for pair in pairs], report)
    report.close()
    for pair, score in zip(pairs, scores, strict=True):
        singles[pair] = score
    return singles


def _screened_pairs(scoring: Scoring, baseline: float, keep: float) -> Tensor:
    """The same, NaN where a pair was passed over. Channel i gains alike from reading channels that
    are alike, and nothing from itself."""
    channels = scoring.num_channels
    budget = max(1, round(keep * channels * (channels - 1)))
    distances = scoring.channel_distances()
    off_diagonal = distances[~torch.eye(channels, dtype=torch.bool)]
    distances /= off_diagonal.median().clamp(min=torch.finfo(distances.dtype).tiny)
    groups = [Group(lambda points: distances[:, points], channel) for channel in range(channels)]
    gains = torch.full((channels, channels), torch.nan, dtype=torch.float64)
    report = scoring.report("pairs", budget)

    def score(places: list[Place]) -> dict[Place, float]:
        pairs: list[Pair] = agreed(places)
        scores = scoring.score([(pair,) for pair in pairs], report)
        return {pair: score - baseline for pair, score in zip(pairs, scores, strict=True)}

    explore(score, gains, scoring.gain_estimates(), groups, budget)
    report.close()
    return (gains + baseline).fill_diagonal_(baseline)


def _screened_subsets(
    scoring: Scoring, baseline: float, candidates: Sequence[Pair], subsets: Sequence[PairSet]
) -> dict[PairSet, float]:
    """Scores of the single candidates and of the most promising other subsets. Subsets that differ
    in few pairs gain alike; the estimate is the sum of their pairs' gains."""
    sets = [(), *subsets]
    members = torch.tensor([[pair in pairs for pair in candidates] for pairs in sets]).double()

    def distances(points: Tensor) -> Tensor:  # a median pair of subsets differs in half the pairs
        return torch.cdist(members, members[points], p=1) / (len(candidates) / 2)

    report = scoring.report("subsets", SCREENED_SUBSETS)
    gains = torch.full((1, len(sets)), torch.nan, dtype=torch.float64)
    singles = sets[1 : len(candidates) + 1]
    scores = dict(zip(singles, scoring.score(singles, report), strict=True))
    of_singles = torch.tensor([scores[single] - baseline for single in singles])
    gains[0, 1 : len(candidates) + 1] = of_singles

    def score(places: list[Place]) -> dict[Place, float]:
        places = agreed(places)
        chosen = [sets[number] for _, number in places]
        scores.update(zip(chosen, scoring.score(chosen, report), strict=True))
        return {
            place: scores[pairs] - baseline for place, pairs in zip(places, chosen, strict=True)
        }

    estimates = (members @ of_singles.double())[None]
    explore(score, gains, estimates, [Group(distances, 0)], SCREENED_SUBSETS - len(candidates))
    report.close()
    return scores


def _audited(
    scoring: Scoring, singles: Tensor, candidates: Sequence[Pair], count: int
) -> list[Pair]:
    passed_over = [(i, j) for i, j in singles.isnan().nonzero().tolist()]
    drawn = torch.randperm(len(passed_over), generator=torch.Generator().manual_seed(0))[:count]
    pairs = [passed_over[number] for number in drawn]
    bar = min((float(singles[pair]) for pair in candidates), default=float(singles[0, 0]))
    report = scoring.report("audit", len(pairs))
    scores = scoring.score([(pair,) for pair in pairs], report)
    report.close()
    return [pair for pair, score in zip(pairs, scores, strict=True) if score > bar]


def _top(singles: Tensor, top_n: int, bar: float) -> list[Pair]:
    """The best pairs above `bar`, at most one for each overwritten channel; ties by number."""
    scores, channels = singles.nan_to_num(-torch.inf), len(singles)
    scores.fill_diagonal_(-torch.inf)
    best: dict[int, Pair] = {}
    for position in scores.flatten().argsort(descending=True, stable=True).tolist():
        i, j = divmod(position, channels)
        if len(best) == top_n or scores[i, j] <= bar:
            break
        best.setdefault(i, (i, j))
    return list(best.values())


def _check_arguments(
    samples: Sequence[Any], top_n: int, strategy: str, keep: float, audit: int
) -> None:
    if not samples:
        raise ValueError("search: no samples")
    if strategy not in STRATEGIES:
        raise ValueError(
            f"search: strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}"
        )
    if not 1 <= top_n <= 16:
        raise ValueError(f"search: top_n must be from 1 to 16, got {top_n}")
    if not 0 < keep <= 1:
        raise ValueError(f"search: keep must be in (0, 1], got {keep}")
    if audit < 0:
        raise ValueError(f"search: audit must be at least 0, got {audit}")


def _sam_of(model: Any) -> "Sam":
    from segment_anything.modeling import Sam

    sam = model.sam if isinstance(model, AdaptedSam) else model
    if not isinstance(sam, Sam):
        raise TypeError(
            "search: without a score_fn, model must be a Sam or an AdaptedSam,"
            f" got {type(model).__name__}"
        )
    return sam


@contextmanager
def _in_eval_mode(model: Any) -> Iterator[None]:
    training = [module for module in modules_of(model) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
