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
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vfmk.channels.channel_map import ChannelMap, Pair
from vfmk.channels.checks import (
    check_arguments,
    check_encoder,
    check_image,
    check_modules,
    check_sample,
    sam_of,
)
from vfmk.channels.digest import digest_of_model, digest_of_samples, modules_of
from vfmk.channels.processes import failing_together, rank
from vfmk.channels.records import PairSet, Records
from vfmk.channels.scorers import FeatureScorer, SamScorer, Scorer
from vfmk.channels.scoring import Scoring
from vfmk.channels.screened import (
    SUBSETS_AT_LEAST,
    SUBSETS_SHARE,
    num_pairs,
    screened_pairs,
    screened_subsets,
)

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

KEEP = 0.09  # the default; with subsets and gradients below a tenth, from 64 channels on


@dataclass(frozen=True)
class SearchResult:
    """What `search` found.

    Attributes:
        baseline: the frozen model's score.
        singles: float64 [C, C], the score of each pair: row i overwritten, column j read. The
            diagonal is the baseline; NaN where "screened" did not score on all samples.
        candidates: the Top-N pairs, best first.
        best: the map of the best subset; under `sequential` the one that does at once what its
            pairs do in order.
        best_score: its score.
        passes: decoder passes spent by this run: one for each set of pairs and sample it was scored
            on, three for a gradient. What was read from `output` cost it none.
        audit: with `audit`, of the pairs that "screened" passed over or dropped and the audit
            looked at, those that would have been candidates, best first.
        known: sets of pairs that `output` had scores of from earlier runs.
    """

    baseline: float
    singles: Tensor
    candidates: list[Pair]
    best: ChannelMap
    best_score: float
    passes: int
    audit: list[Pair] | None = None
    known: int = 0


def search(
    model: nn.Module | Callable[[Tensor], Tensor],
    samples: Sequence[Any],
    *,
    top_n: int = 10,
    strategy: str = "exhaustive",
    score_fn: Callable[[Tensor, Any], Tensor] | None = None,
    sequential: bool = False,
    positive_only: bool = False,
    keep: float | None = None,
    audit: int = 0,
    output: str | PathLike[str] | None = None,
    progress: bool = True,
) -> SearchResult:
    """Find the channels of a frozen encoder that are better overwritten by others.

    The score of a set of pairs is its mean over `samples`; for a SAM the IoU of the single mask for
    a sample's points, at the image's own size, 0 where mask and prediction are both empty.
    "exhaustive" scores all C·(C − 1) pairs, takes the `top_n` best with at most one for each
    overwritten channel, and scores their 2^N − 1 subsets: the published protocol, number by number.
    "screened" spends the share `keep` of the passes for all pairs on those, and as many as for
    max(128, 0.01·C·(C − 1)) subsets on the subsets, if there are more: on the ones that promise
    most by a first-order estimate (one gradient a sample gives all) and by what was scored before
    of their like. They race: one is scored sample by sample, and dropped when it is clear that it
    will not be among the best. The scores of the others are exact, but a good pair or subset may be
    missed: on 14 sets of 50 samples, with 64 channels, none of ten candidates on nine of them, one
    or two on four, three on one, and IoU of up to 0.002; with ten or twenty samples up to five, and
    IoU of up to 0.015.

    Every sample is encoded once. With torch.distributed initialised the work is shared out, and
    each process gets the same result. autocast and inference_mode are off while the search runs.

    Args:
        model: a `segment_anything` Sam, an AdaptedSam or a PeftModel of one, as it is (accelerated,
            with LoRA, …), without a channel map; with `score_fn` any encoder:
            `model(sample.image[None])`, the image moved to its device, gives features
            [1, C, h, w], or [1, N, C] or [1, C] with the channels last.
        samples: from `load_samples`; with `score_fn` anything with an `image`, a tensor.
        top_n: pairs whose subsets are scored, 1 to 16.
        score_fn: `score_fn(features, sample)`, for features of K sets of pairs at once, gives a
            float tensor [K], more being better. "screened" needs its gradient.
        sequential: apply the pairs of a subset one after the other, as the authors' early scripts
            do, instead of all at once.
        positive_only: take no candidate that scores at or below the frozen model.
        keep: the share of the passes on all pairs that "screened" spends on them, in (0, 1]; by
            default 0.09.
        audit: score so many of the pairs that "screened" passed over or dropped, drawn at random,
            the same ones in each run.
        output: a JSONL file of scores in the authors' format. If it exists the search goes on where
            it ended, and scores nothing again but what it was at when it was killed, some seconds'
            work; it is locked while the search runs. A file of another model, samples, score or
            `sequential` is refused. What a score_fn computes cannot be told from outside, nor does
            a file that the authors' tool began say of what it is: then the frozen model and 16 of
            the pairs and subsets scored there on all samples are scored anew, and must be as there
            to a thousandth of their size. Features, gradients, and scores sample by sample of the
            frozen model are not in it.
        progress: report to stderr.

    Raises:
        TypeError: a model that is no SAM, without a score_fn; an argument of another type.
        ValueError: no samples, one that is not as described, a model that has a channel map, an
            argument out of range; an output that another run holds, that is of another model,
            samples or options, or for which the samples cannot be told apart.

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
    check_arguments(samples, top_n, strategy, keep, audit)
    modules = [*modules_of(model), *modules_of(score_fn)]
    check_modules(modules, strategy)
    sam = sam_of(model) if score_fn is None else None
    if sam is None:
        check_encoder(model)
    for sample in samples:
        (check_image if sam is None else check_sample)(sample)
    with failing_together(OSError, ValueError):
        records = _opened(output, sam, samples, sequential)
    try:
        with _in_eval_mode(modules), _in_plain_mode():
            scorer: Scorer
            if score_fn is None:
                scorer = SamScorer(cast("Sam", sam))
            else:
                scorer = FeatureScorer(model, score_fn)
            scoring = Scoring(scorer, samples, records, progress)
            share = KEEP if keep is None else keep
            return _search(scoring, top_n, strategy, positive_only, share, audit)
    finally:
        records.close()


def _opened(
    output: str | PathLike[str] | None,
    sam: "Sam | None",
    samples: Sequence[Any],
    sequential: bool,
) -> Records:
    """The first process alone has the file."""
    if output is None or rank() > 0:
        return Records(None, {}, len(samples), sequential)
    run = {"score": "score_fn" if sam is None else "IoU", "samples": digest_of_samples(samples)}
    if sam is not None:
        run["model"] = digest_of_model(sam)
    return Records(Path(output), run, len(samples), sequential)


def _search(
    scoring: Scoring, top_n: int, strategy: str, positive_only: bool, keep: float, audit: int
) -> SearchResult:
    (baseline,) = scoring.score([()], scoring.report("frozen model", 1))
    if strategy == "screened":
        singles = screened_pairs(scoring, baseline, keep, top_n)
    else:
        singles = _all_pairs(scoring, baseline)
    bar = baseline if positive_only else -torch.inf
    candidates = _top(singles, top_n, bar)
    subsets: list[PairSet] = [
        subset
        for size in range(1, len(candidates) + 1)
        for subset in itertools.combinations(candidates, size)
    ]
    limit = max(SUBSETS_AT_LEAST, round(SUBSETS_SHARE * num_pairs(scoring)))
    if strategy == "screened" and len(subsets) > limit:
        scores = screened_subsets(scoring, baseline, singles, candidates, subsets, limit)
    else:
        report = scoring.report("subsets", len(subsets))
        scores = dict(zip(subsets, scoring.score(subsets, report), strict=True))
        report.close()
    best = min(scores, key=lambda pairs: (-scores[pairs], len(pairs), sorted(pairs)), default=())
    audited = None
    if audit:
        singles = _audited(scoring, singles, audit)
        audited = [pair for pair in _top(singles, top_n, bar) if pair not in candidates]
    return SearchResult(
        baseline,
        singles,
        candidates,
        scoring.map_of(best),
        scores.get(best, baseline),
        scoring.passes,
        audited,
        scoring.known,
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


def _audited(scoring: Scoring, singles: Tensor, count: int) -> Tensor:
    """`singles`, with the scores of `count` pairs that were NaN."""
    passed_over = [(i, j) for i, j in singles.isnan().nonzero().tolist()]
    drawn = torch.randperm(len(passed_over), generator=torch.Generator().manual_seed(0))[:count]
    pairs = [passed_over[number] for number in drawn]
    report = scoring.report("audit", len(pairs))
    scores = scoring.score([(pair,) for pair in pairs], report)
    report.close()
    completed = singles.clone()
    for pair, score in zip(pairs, scores, strict=True):
        completed[pair] = score
    return completed


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


@contextmanager
def _in_eval_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _in_plain_mode() -> Iterator[None]:
    """Gradients can be taken, and every operation keeps its dtype."""
    with (
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield
