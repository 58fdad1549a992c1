"""The search for better channels, by inference alone.

Source: Redundancy Elimination for Vision Foundation Models (AAAI 2026, arXiv 2504.08915): score
every pair of channels, keep the best few, score all their subsets, keep the best.
"""

import datetime
import hashlib
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from vfmk.channels.channel_map import ChannelMap, Pair
from vfmk.channels.records import Pairs, Records, Score
from vfmk.channels.scorers import FeatureScorer, SamScorer, Scorer, channel_dim, chunk_size
from vfmk.sam.adapt import AdaptedSam

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

Items = TypeVar("Items", bound=Sequence[Any])
STRATEGIES = ("exhaustive", "screened")
BLOCK_CHUNKS = 4  # chunks of candidates whose scores are written down together
FIRST_HEAT, FIRST_HEAT_OF_SUBSETS = 6, 12  # a race begins on a 6th, a 12th of the samples
FINALISTS = 4  # times top_n: what a race leaves to be scored on all samples
RIVALS = 4  # pairs that overwrite the same channel and go on in a race
GRADIENT_PASSES = 3  # what a gradient counts for
NO_SCORE = Score(0.0, 0)


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
        passes: decoder passes spent: one for each candidate and sample, three for a gradient.
        audit: with `audit`, the pairs that were rejected although they score above the worst
            candidate, of those looked at.
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
    keep: float = 0.15,
    audit: int = 0,
    output: str | PathLike[str] | None = None,
    progress: bool = True,
) -> SearchResult:
    """Find the channels of a frozen encoder that are better overwritten by others.

    The score of a candidate is its mean over `samples`; for a SAM the IoU of the single mask for a
    sample's points, at the image's own size, 0 where mask and prediction are both empty.
    "exhaustive" scores all C·(C − 1) pairs, takes the `top_n` best with at most one for each
    overwritten channel, and scores their 2^N − 1 subsets: the published protocol, number by number.
    "screened" ranks the pairs by a first-order estimate (one gradient a sample gives all), then
    races the share `keep` of them, and the subsets, over more and more samples; its scores are
    exact, but a good pair may be missed.

    Every sample is encoded once. With torch.distributed initialised the candidates are shared out,
    and each process gets the same result.

    Args:
        model: a `segment_anything` Sam or an AdaptedSam, as it is (accelerated, with LoRA, …); with
            `score_fn` any encoder: `model(sample.image[None])` gives features [1, C, h, w], or
            [1, N, C] or [1, C] with the channels last.
        samples: from `load_samples`; with `score_fn` anything with an `image`, a tensor.
        top_n: pairs whose subsets are scored, 1 to 16.
        score_fn: `score_fn(features, sample)`, for features of K candidates at once, gives a float
            tensor [K], more being better. "screened" needs its gradient.
        sequential: apply the pairs of a subset one after the other, as the authors' early scripts
            do, instead of all at once.
        positive_only: take no candidate that scores below the frozen model.
        audit: score so many of the pairs that "screened" rejected, drawn at random.
        output: a JSONL file of scores in the authors' format. If it exists the search goes on where
            it ended; it is locked while the search runs.
        progress: report to stderr.

    Raises:
        TypeError: a model that is no SAM, without a score_fn.
        ValueError: no samples, an empty mask, an argument out of range; an output that another run
            holds, or that is of another model, samples or options.
    """
    _check_arguments(samples, top_n, strategy, keep, audit)
    scorer: Scorer = (
        SamScorer(_sam_of(model)) if score_fn is None else FeatureScorer(model, score_fn)
    )
    run = {
        "model": _digest_of_model(model),
        "samples": _digest_of_samples(samples),
        "score": "IoU" if score_fn is None else _name_of(score_fn),
        "sequential": sequential,
    }
    records = Records(Path(output) if output and _rank() == 0 else None, run, len(samples))
    with _in_eval_mode(model):
        try:
            scoring = _Scoring(scorer, samples, records, sequential, progress)
            return _search(scoring, top_n, strategy, positive_only, keep, audit)
        finally:
            records.close()


def _search(
    scoring: "_Scoring", top_n: int, strategy: str, positive_only: bool, keep: float, audit: int
) -> SearchResult:
    channels = scoring.num_channels
    (baseline,) = scoring.score([()], "frozen model")
    pairs: list[Pairs] = [(pair,) for pair in itertools.permutations(range(channels), 2)]
    rejected: list[Pairs] = []
    if strategy == "screened":
        estimates = scoring.gain_estimates()
        gains = estimates.mean(0).tolist()
        pairs.sort(key=lambda pairs: gains[pairs[0][0]][pairs[0][1]], reverse=True)
        kept = max(round(keep * len(pairs)), top_n)
        pairs, rejected = pairs[:kept], pairs[kept:]
        pairs = scoring.race_pairs(pairs, FINALISTS * top_n, estimates)
    singles = torch.full((channels, channels), torch.nan, dtype=torch.float64)
    singles.fill_diagonal_(baseline)
    for (pair,), score in zip(pairs, scoring.score(pairs, "pairs"), strict=True):
        singles[pair] = score
    candidates = _top(singles, top_n, baseline if positive_only else -torch.inf)
    subsets: list[Pairs] = [
        subset
        for size in range(1, len(candidates) + 1)
        for subset in itertools.combinations(candidates, size)
    ]
    if strategy == "screened":
        subsets = scoring.race(subsets, FINALISTS * top_n)
    scored = zip(scoring.score(subsets, "subsets"), subsets, strict=True)
    best_score, best = min(
        scored, key=lambda one: (-one[0], len(one[1]), one[1]), default=(baseline, ())
    )
    audited: list[Pair] | None = None
    if audit:
        drawn = torch.randperm(len(rejected), generator=_generator())[:audit].tolist()
        looked_at = [rejected[i] for i in drawn]
        bar = min((singles[pair] for pair in candidates), default=baseline)
        scores = scoring.score(looked_at, "audit")
        audited = [p for (p,), score in zip(looked_at, scores, strict=True) if score > bar]
    return SearchResult(
        baseline, singles, candidates, scoring.map_of(best), best_score, scoring.passes, audited
    )


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


class _Scoring:
    """Scores of candidates, each a set of pairs: from the records, or computed and put there."""

    def __init__(
        self,
        scorer: Scorer,
        samples: Sequence[Any],
        records: Records,
        sequential: bool,
        progress: bool,
    ) -> None:
        # Races look at the first samples; the order given may be one of likeness.
        order = torch.randperm(len(samples), generator=_generator()).tolist()
        self.prepared = [scorer.prepare(samples[i]) for i in order]
        self.scorer = scorer
        self.records = records
        self.sequential = sequential
        self.progress = progress
        self.passes = 0
        features = scorer.features(self.prepared[0])
        self.device = features.device
        self.num_channels = features.shape[channel_dim(features)]
        self.chunk = chunk_size(features)
        for prepared in self.prepared:
            found = scorer.features(prepared)
            if found.shape[channel_dim(found)] != self.num_channels:
                raise ValueError(
                    f"search: the features of one sample have {self.num_channels} channels, of"
                    f" another {found.shape[channel_dim(found)]}"
                )
        if _world_size() > 1:
            shared = [records.scores]
            torch.distributed.broadcast_object_list(shared)
            records.scores = shared[0]

    def map_of(self, pairs: Pairs) -> ChannelMap:
        if self.sequential:
            return ChannelMap.in_order(pairs, self.num_channels)
        return ChannelMap(pairs, self.num_channels)

    def score(
        self, candidates: Sequence[Pairs], title: str, samples: int | None = None
    ) -> list[float]:
        """Means over the first `samples` samples, by default all, or over more where known."""
        samples = samples or len(self.prepared)
        known = self.records.scores
        missing = [pairs for pairs in candidates if known.get(pairs, NO_SCORE).samples < samples]
        missing.sort(key=lambda pairs: known.get(pairs, NO_SCORE).samples)
        report = _Report(title, len(missing), self.progress and _rank() == 0)
        for begun, group in itertools.groupby(
            missing, key=lambda pairs: known.get(pairs, NO_SCORE).samples
        ):
            for block in _blocks(list(group), BLOCK_CHUNKS * self.chunk * _world_size()):
                sums = self._sums(block, begun, samples)
                new = {
                    pairs: Score(
                        (known.get(pairs, NO_SCORE).value * begun + total) / samples, samples
                    )
                    for pairs, total in zip(block, sums, strict=True)
                }
                self.records.add(new)
                report.advance(len(block), (samples - begun) * len(block), new)
        report.close()
        return [known[pairs].value for pairs in candidates]

    def race_pairs(
        self, candidates: Sequence[Pairs], finalists: int, estimates: Tensor
    ) -> list[Pairs]:
        """The single pairs that stay ahead while the samples double and the field halves.

        What the first samples say of a pair is corrected by how much they flatter its first-order
        estimate [samples, C, C]. Of the pairs that overwrite one channel only the best few go on.
        """
        remaining = list(candidates)
        samples = max(2, len(self.prepared) // FIRST_HEAT)
        sums = estimates.cumsum(0)
        mean = sums[-1] / len(estimates)
        while samples < len(self.prepared) and len(remaining) > finalists:
            self.score(remaining, f"pairs, on {samples} samples", samples)
            corrected = {}
            for pairs in remaining:
                score, known = self.records.scores[pairs]
                (pair,) = pairs
                corrected[pairs] = score - float(sums[known - 1][pair] / known - mean[pair])
            ahead: list[Pairs] = []
            rivals: Counter[int] = Counter()
            for pairs in sorted(corrected, key=corrected.__getitem__, reverse=True):
                rivals[pairs[0][0]] += 1
                if rivals[pairs[0][0]] <= RIVALS:
                    ahead.append(pairs)
            remaining = ahead[: max(finalists, len(remaining) // 2)]
            samples *= 2
        return remaining

    def race(self, candidates: Sequence[Pairs], finalists: int) -> list[Pairs]:
        """The subsets that stay ahead while the samples double and the field halves."""
        remaining = list(candidates)
        samples = max(2, len(self.prepared) // FIRST_HEAT_OF_SUBSETS)
        while samples < len(self.prepared) and len(remaining) > finalists:
            scores = self.score(remaining, f"subsets, on {samples} samples", samples)
            order = sorted(range(len(remaining)), key=lambda k: scores[k], reverse=True)
            remaining = [remaining[k] for k in order[: max(finalists, len(order) // 2)]]
            samples *= 2
        return remaining

    def gain_estimates(self) -> Tensor:
        """To first order, what each pair adds to the score of each sample: [samples, C, C]."""
        estimates = torch.zeros(
            len(self.prepared), self.num_channels, self.num_channels, device=self.device
        )
        for number in range(_rank(), len(self.prepared), _world_size()):
            estimates[number] = self.scorer.gain_estimates(self.prepared[number]).detach()
        self.passes += GRADIENT_PASSES * len(self.prepared)
        return _summed(estimates).cpu()

    def _sums(self, block: Sequence[Pairs], begin: int, end: int) -> list[float]:
        """Sums of the scores on samples [begin, end)."""
        sums = torch.zeros(len(block), dtype=torch.float64, device=self.device)
        mine = range(_rank(), len(block), _world_size())
        for chunk in _blocks(mine, self.chunk):
            overwritten, read = self._tensors([block[i] for i in chunk])
            of_chunk = sums[chunk.start : chunk.stop : chunk.step]
            for prepared in self.prepared[begin:end]:
                of_chunk += self.scorer.scores(prepared, overwritten, read).double()
        if not sums.isfinite().all():
            raise ValueError("search: a score is not finite")
        self.passes += len(block) * (end - begin)
        return _summed(sums).tolist()

    def _tensors(self, candidates: Sequence[Pairs]) -> tuple[Tensor, Tensor]:
        """Channels overwritten and read, [K, P]; short sets are filled up with (0, 0)."""
        sets = [self.map_of(pairs).pairs for pairs in candidates]
        width = max(1, *map(len, sets))
        filled = [[*pairs, *[(0, 0)] * (width - len(pairs))] for pairs in sets]
        overwritten, read = torch.tensor(filled, device=self.device).unbind(-1)
        return overwritten, read


class _Report:
    """A line on stderr: how far, how fast, how long to go, the best so far."""

    def __init__(self, title: str, total: int, shown: bool) -> None:
        self.title, self.total, self.shown = title, total, shown and total > 1
        self.done = self.passes = 0
        self.best = -math.inf
        self.begun = self.printed = time.monotonic()
        self.live = sys.stderr.isatty()

    def advance(self, candidates: int, passes: int, scores: Mapping[Pairs, Score]) -> None:
        self.done += candidates
        self.passes += passes
        for pairs, score in scores.items():
            if score.value > self.best:
                self.best, self.best_pairs = score.value, pairs
        now = time.monotonic()
        if self.shown and now - self.printed > (0.2 if self.live else 30):
            self.printed = now
            self._print(now)

    def close(self) -> None:
        if self.shown and self.done:
            self._print(time.monotonic())
            print(file=sys.stderr)

    def _print(self, now: float) -> None:
        seconds = now - self.begun
        left = datetime.timedelta(seconds=round(seconds / self.done * (self.total - self.done)))
        best = " ".join(f"{i}:{j}" for i, j in self.best_pairs)
        line = (
            f"search: {self.title}: {self.done:,} of {self.total:,}, {self.passes / seconds:,.0f}"
            f" passes/s, {left} left, best {self.best:.4f} ({best})"
        )
        print(
            f"\r{line}\x1b[K" if self.live else line, end="" if self.live else "\n", file=sys.stderr
        )


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
    training = [module for module in _modules(model) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _modules(model: Any) -> list[nn.Module]:
    """The model's, and those of the adapters in force, which a Sam does not own."""
    if not isinstance(model, nn.Module):
        return []
    stacks = {stack for module in model.modules() for stack in vars(module).get("_adapters", ())}
    return [*model.modules(), *(module for stack in stacks for module in stack.modules())]


def _digest_of_model(model: Any) -> str:
    items: list[tuple[str, Any]] = [("", _name_of(model))]
    for module in _modules(model):
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        items += [("", type(module).__name__ + module.extra_repr()), *tensors]
    return _digest(items)


def _name_of(model: Any) -> str:
    return getattr(model, "__qualname__", type(model).__qualname__)


def _digest_of_samples(samples: Sequence[Any]) -> str:
    return _digest([item for sample in samples for item in sorted(vars(sample).items())])


def _digest(items: Iterable[tuple[str, Any]]) -> str:
    """SHA-256 of named tensors, arrays, strings and numbers; of other values the name."""
    digest = hashlib.sha256()
    for name, value in items:
        digest.update(name.encode())
        if isinstance(value, str | int | float):
            digest.update(repr(value).encode())
        elif isinstance(value, Tensor):
            digest.update(
                value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            )
        elif hasattr(value, "tobytes"):
            digest.update(value.tobytes())
    return digest.hexdigest()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _blocks(items: Items, size: int) -> Iterator[Items]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]  # type: ignore[misc]  # a slice is of the same type


def _summed(tensor: Tensor) -> Tensor:
    """Over all processes."""
    if _world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if _initialized() else 1


def _rank() -> int:
    return torch.distributed.get_rank() if _initialized() else 0


def _initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
