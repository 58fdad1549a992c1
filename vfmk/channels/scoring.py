"""Scores of sets of pairs on all samples: from the records, or computed and put there.

With torch.distributed initialised, the encoding of the samples and the sets to score are shared
out, and every process gets all results.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from vfmk.channels.channel_map import ChannelMap
from vfmk.channels.processes import agreed, failing_together, gathered, rank, summed, world_size
from vfmk.channels.progress import Report
from vfmk.channels.records import PairSet, Records
from vfmk.channels.scorers import Scorer, channel_dim, chunk_size

Items = TypeVar("Items", bound=Sequence[Any])
BLOCK_CHUNKS = 4  # chunks of sets whose scores are written down together
PROBES = 16  # sets scored anew, where it is not known of what the records are
GRADIENT_PASSES = 3  # what a gradient counts for


class Scoring:
    """Scores sets of pairs on samples that it has encoded.

    Attributes:
        features: of each sample.
        prepared: what `Scorer.prepare` makes of each.
        num_channels: of the features.
        chunk: how many candidates to score at once.
        passes: decoder passes spent so far, by all processes.
        known: how many scores the records had to begin with.
    """

    def __init__(
        self, scorer: Scorer, samples: Sequence[Any], records: Records, progress: bool
    ) -> None:
        self.scorer = scorer
        self.records = records
        self.progress = progress and rank() == 0
        self.passes = 0
        mine = -(-len(samples) // world_size())  # the first process's
        self.features = _encoded(
            scorer, samples, Report("encoding", mine, self.progress, unit="images")
        )
        self.num_channels = _num_channels(self.features)
        self.prepared = [
            scorer.prepare(sample, features)
            for sample, features in zip(samples, self.features, strict=True)
        ]
        self.device = self.features[0].device
        # The same in every process.
        largest = max(self.features, key=lambda features: features.nbytes)
        self.chunk = min(gathered(chunk_size(largest, scorer.copies)))
        records.scores, records.raced, records.is_foreign = agreed(
            (records.scores, records.raced, records.is_foreign)
        )
        with failing_together(ValueError):
            records.check(self.num_channels)
        if records.scores and (records.is_foreign or not scorer.is_known):
            probed = _spread(sorted(records.scores, key=records.scores.__getitem__))
            found = dict(zip(probed, self._means(probed), strict=True))
            with failing_together(ValueError):
                records.check_scores(found)
        self.known = len(records.scores.keys() | records.raced)

    def map_of(self, pairs: PairSet) -> ChannelMap:
        if self.records.sequential:
            return ChannelMap.in_order(pairs, self.num_channels)
        return ChannelMap(pairs, self.num_channels)

    def report(self, title: str, sets: int) -> Report:
        """With one set nothing is said."""
        return Report(title, sets * len(self.prepared), self.progress and sets > 1)

    def score(self, sets: Sequence[PairSet], report: Report) -> list[float]:
        """The mean over the samples for each set of pairs."""
        known, samples = self.records.scores, len(self.prepared)
        sets = [self.records.key(pairs) for pairs in sets]
        missing = [pairs for pairs in sets if pairs not in known]
        report.skip(
            (len(sets) - len(missing)) * samples,
            {pairs: known[pairs] for pairs in sets if pairs in known},
        )
        for block in blocks_of(missing, self.block):
            new = dict(zip(block, self._means(block), strict=True))
            self.records.add(new)
            report.advance(len(block) * samples, new)
        return [known[pairs] for pairs in sets]

    @cached_property
    def first_order_gains(self) -> Tensor:
        """What each pair adds to the score of each sample, to first order: float32 [n, C, C]."""
        gains = torch.zeros(
            len(self.prepared), self.num_channels, self.num_channels, device=self.device
        )
        mine = range(rank(), len(self.prepared), world_size())
        report = Report("gradients", len(mine), self.progress, unit="images")
        for number in mine:
            gains[number] = self.scorer.gain_estimates(self.prepared[number]).detach()
            report.advance(1, {})
        report.close()
        self.passes += GRADIENT_PASSES * len(self.prepared)
        if not summed(gains).isfinite().all():
            raise ValueError("search: a gradient of the score is not finite")
        return gains.cpu()

    @cached_property
    def frozen_scores(self) -> Tensor:
        """The frozen model's on each sample: float64 [n]."""
        scores = torch.zeros(len(self.prepared), dtype=torch.float64, device=self.device)
        overwritten, read = self.tensors([()])
        for number in range(rank(), len(self.prepared), world_size()):
            prepared = self.prepared[number]
            scores[number] = self.scorer.scores(prepared, overwritten, read).double()[0]
        self.passes += len(self.prepared)
        return summed(scores)

    def channel_distances(self) -> Tensor:
        """Mean squared difference of channels over samples and places: float64 [C, C]."""
        products = torch.zeros(self.num_channels, self.num_channels, dtype=torch.float64)
        for features in self.features:
            by_channel = features.movedim(channel_dim(features), 0).flatten(1).double()
            products += (by_channel @ by_channel.T / by_channel.shape[1]).cpu()
        squares = products.diag()
        return (squares[:, None] + squares - 2 * products).clamp(min=0) / len(self.features)

    def _means(self, block: Sequence[PairSet]) -> list[float]:
        sums = torch.zeros(len(block), dtype=torch.float64, device=self.device)
        for chunk in blocks_of(range(rank(), len(block), world_size()), self.chunk):
            overwritten, read = self.tensors([block[i] for i in chunk])
            of_chunk = sums[chunk.start : chunk.stop : chunk.step]
            for prepared in self.prepared:
                of_chunk += self.scorer.scores(prepared, overwritten, read).double()
        # First the sum: what is not finite in one process then stops them all.
        if not summed(sums).isfinite().all():
            raise ValueError("search: a score is not finite")
        self.passes += len(block) * len(self.prepared)
        return (sums / len(self.prepared)).tolist()

    @property
    def block(self) -> int:
        """How many sets of pairs to score before their scores are written down."""
        return BLOCK_CHUNKS * self.chunk * world_size()

    def tensors(self, sets: Sequence[PairSet]) -> tuple[Tensor, Tensor]:
        """Channels overwritten and read, [K, P]; short sets are filled up with (0, 0)."""
        pairs_of = [self.map_of(pairs).pairs for pairs in sets]
        width = max(1, *map(len, pairs_of))
        filled = [[*pairs, *[(0, 0)] * (width - len(pairs))] for pairs in pairs_of]
        overwritten, read = torch.tensor(filled, device=self.device).unbind(-1)
        return overwritten, read


def _encoded(scorer: Scorer, samples: Sequence[Any], report: Report) -> list[Tensor]:
    """The features of each sample, each encoded by one process."""
    mine = []
    # At least one each, which also says on which device this process works.
    for sample in samples[rank() :: world_size()] or samples[:1]:
        mine.append(scorer.encode(sample))
        report.advance(1, {})
    report.close()
    if world_size() == 1:
        return mine
    shared = gathered([features.cpu() for features in mine])
    return [
        shared[number % world_size()][number // world_size()].to(mine[0].device)
        for number in range(len(samples))
    ]


def _spread(ranked: Sequence[PairSet]) -> list[PairSet]:
    """The frozen model, and of the others the best, the worst and some in between."""
    others = [pairs for pairs in ranked if pairs]
    share = (len(others) - 1) / (PROBES - 1)
    drawn = [others[round(number * share)] for number in range(PROBES)] if others else []
    return list(dict.fromkeys([(), *drawn]))


def _num_channels(features: Sequence[Tensor]) -> int:
    channels, *others = (found.shape[channel_dim(found)] for found in features)
    for other in others:
        if other != channels:
            raise ValueError(
                f"search: the features of one sample have {channels} channels, of another {other}"
            )
    return channels


def blocks_of(items: Items, size: int) -> Iterator[Items]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]  # type: ignore[misc]  # a slice is of the same type
