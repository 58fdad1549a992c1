"""Scores of sets of pairs on all samples: from the records, or computed and put there.

With torch.distributed initialised, the encoding of the samples and the sets to score are shared
out, and every process gets all results.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from vfmk.channels.channel_map import ChannelMap
from vfmk.channels.progress import Report
from vfmk.channels.records import PairSet, Records
from vfmk.channels.scorers import Scorer, channel_dim, chunk_size

Items = TypeVar("Items", bound=Sequence[Any])
BLOCK_CHUNKS = 4  # chunks of sets whose scores are written down together
GRADIENT_PASSES = 3  # what a gradient counts for


class Scoring:
    """Scores sets of pairs on samples that it has encoded.

    Attributes:
        features: of each sample.
        num_channels: of the features.
        passes: decoder passes spent so far, by all processes.
        known: how many scores the records had to begin with.
    """

    def __init__(
        self,
        scorer: Scorer,
        samples: Sequence[Any],
        records: Records,
        sequential: bool,
        progress: bool,
    ) -> None:
        self.scorer = scorer
        self.records = records
        self.sequential = sequential
        self.progress = progress and rank() == 0
        self.passes = 0
        self.features = _encoded(scorer, samples)
        self.num_channels = _num_channels(self.features)
        self.prepared = [
            scorer.prepare(sample, features)
            for sample, features in zip(samples, self.features, strict=True)
        ]
        self.device = self.features[0].device
        # The same in every process.
        self.chunk = min(_gathered(chunk_size(self.features[0], scorer.copies)))
        records.scores = agreed(records.scores)
        _check_pairs(records.scores, self.num_channels)
        self.known = len(records.scores)

    def map_of(self, pairs: PairSet) -> ChannelMap:
        if self.sequential:
            return ChannelMap.in_order(pairs, self.num_channels)
        return ChannelMap(pairs, self.num_channels)

    def report(self, title: str, total: int) -> Report:
        return Report(title, total, self.progress)

    def score(self, sets: Sequence[PairSet], report: Report) -> list[float]:
        """The mean over the samples for each set of pairs."""
        known = self.records.scores
        report.skip({pairs: known[pairs] for pairs in sets if pairs in known})
        missing = [pairs for pairs in sets if pairs not in known]
        for block in _blocks(missing, BLOCK_CHUNKS * self.chunk * world_size()):
            new = dict(zip(block, self._means(block), strict=True))
            self.records.add(new)
            report.advance(len(block) * len(self.prepared), new)
        return [known[pairs] for pairs in sets]

    def gain_estimates(self) -> Tensor:
        """To first order, what each pair adds to the score: float64 [C, C]."""
        estimates = torch.zeros(
            self.num_channels, self.num_channels, dtype=torch.float64, device=self.device
        )
        for prepared in self.prepared[rank() :: world_size()]:
            estimates += self.scorer.gain_estimates(prepared).detach()
        self.passes += GRADIENT_PASSES * len(self.prepared)
        if not _summed(estimates).isfinite().all():
            raise ValueError("search: a gradient of the score is not finite")
        return estimates.cpu() / len(self.prepared)

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
        for chunk in _blocks(range(rank(), len(block), world_size()), self.chunk):
            overwritten, read = self._tensors([block[i] for i in chunk])
            of_chunk = sums[chunk.start : chunk.stop : chunk.step]
            for prepared in self.prepared:
                of_chunk += self.scorer.scores(prepared, overwritten, read).double()
        # First the sum: what is not finite in one process then stops them all.
        if not _summed(sums).isfinite().all():
            raise ValueError("search: a score is not finite")
        self.passes += len(block) * len(self.prepared)
        return (sums / len(self.prepared)).tolist()

    def _tensors(self, sets: Sequence[PairSet]) -> tuple[Tensor, Tensor]:
        """Channels overwritten and read, [K, P]; short sets are filled up with (0, 0)."""
        pairs_of = [self.map_of(pairs).pairs for pairs in sets]
        width = max(1, *map(len, pairs_of))
        filled = [[*pairs, *[(0, 0)] * (width - len(pairs))] for pairs in pairs_of]
        overwritten, read = torch.tensor(filled, device=self.device).unbind(-1)
        return overwritten, read


def _encoded(scorer: Scorer, samples: Sequence[Any]) -> list[Tensor]:
    """The features of each sample, each encoded by one process."""
    # At least one each, which also says on which device this process works.
    mine = [scorer.encode(sample) for sample in samples[rank() :: world_size()] or samples[:1]]
    if world_size() == 1:
        return mine
    shared = _gathered([features.cpu() for features in mine])
    return [
        shared[number % world_size()][number // world_size()].to(mine[0].device)
        for number in range(len(samples))
    ]


def _num_channels(features: Sequence[Tensor]) -> int:
    channels, *others = (found.shape[channel_dim(found)] for found in features)
    for other in others:
        if other != channels:
            raise ValueError(
                f"search: the features of one sample have {channels} channels, of another {other}"
            )
    return channels


def _check_pairs(known: Iterable[PairSet], channels: int) -> None:
    for pairs in known:
        for pair in pairs:
            if not 0 <= min(pair) <= max(pair) < channels:
                raise ValueError(
                    f"search: output has a score of the pair {pair}, there are {channels} channels"
                )


def _blocks(items: Items, size: int) -> Iterator[Items]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]  # type: ignore[misc]  # a slice is of the same type


def agreed(value: Any) -> Any:
    """The first process's."""
    if world_size() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def _gathered(value: Any) -> list[Any]:
    """Each process's."""
    values = [value] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def _summed(tensor: Tensor) -> Tensor:
    """Over all processes, in place."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def world_size() -> int:
    return torch.distributed.get_world_size() if _initialized() else 1


def rank() -> int:
    return torch.distributed.get_rank() if _initialized() else 0


def _initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
