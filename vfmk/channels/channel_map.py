"""Which channel is overwritten by which: the whole result of parameter-free fine-tuning."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vfmk._files import write_whole

Pair = tuple[int, int]
SAM_CHANNELS = 256  # of the embedding of every published SAM


@dataclass(frozen=True)
class ChannelMap:
    """Pairs (i, j): channel i is overwritten by channel j. All reads are from the original.

    Args:
        pairs: each channel is overwritten at most once; i ≠ j.
        num_channels: C, of the features.

    Raises:
        TypeError: pairs that are not pairs of ints, or num_channels that is no int.
        ValueError: a channel outside [0, C), overwritten by itself, or overwritten twice.

    Source: Redundancy Elimination for Vision Foundation Models (AAAI 2026, arXiv 2504.08915).
    """

    pairs: tuple[Pair, ...]
    num_channels: int

    def __post_init__(self) -> None:
        if not isinstance(self.num_channels, int):
            raise TypeError(f"ChannelMap: num_channels must be an int, got {self.num_channels!r}")
        pairs = tuple(checked_pair(pair) for pair in self.pairs)
        object.__setattr__(self, "pairs", pairs)
        seen: dict[int, int] = {}
        for i, j in pairs:
            if not (0 <= i < self.num_channels and 0 <= j < self.num_channels):
                raise ValueError(
                    f"ChannelMap: pair {i}:{j} is outside the {self.num_channels} channels"
                )
            if i == j:
                raise ValueError(f"ChannelMap: pair {i}:{j} overwrites a channel by itself")
            if i in seen:
                raise ValueError(
                    f"ChannelMap: pairs {i}:{seen[i]} and {i}:{j} clash: both overwrite channel {i}"
                )
            seen[i] = j

    @classmethod
    def in_order(cls, pairs: Iterable[Pair], num_channels: int) -> "ChannelMap":
        """The map that does at once what `pairs` do one after the other, each reading what the
        ones before it have written."""
        index = list(range(num_channels))
        for i, j in cls(tuple(pairs), num_channels).pairs:
            index[i] = index[j]
        return cls(tuple((i, j) for i, j in enumerate(index) if i != j), num_channels)

    @property
    def index(self) -> Tensor:
        """int64 [C]: the channel that each channel reads."""
        index = torch.arange(self.num_channels)
        for i, j in self.pairs:
            index[i] = j
        return index

    def save(self, path: str | PathLike[str], **facts: Any) -> None:
        """Write a JSON file, whole or not at all.

        `facts` go into it as they are; the authors' tool writes "dataset", "backend", "miou",
        "delta" and "samples".
        """
        content = {**facts, "pairs": self.pairs, "num_channels": self.num_channels}
        write_whole(Path(path), (json.dumps(content, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "ChannelMap":
        """Read what `save` or the authors' tool wrote; theirs does not say C, which is then 256.

        Raises:
            FileNotFoundError: no such file.
            ValueError: naming the file and what is wrong with it.
        """
        document = Path(path).read_bytes()
        try:
            content = json.loads(document)
            return cls(content["pairs"], content.get("num_channels", SAM_CHANNELS))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"ChannelMap.load: {path} is no channel map: {error}") from error


def checked_pair(pair: Sequence[int]) -> Pair:
    if (
        not isinstance(pair, Sequence)
        or len(pair) != 2
        or any(not isinstance(channel, int) or isinstance(channel, bool) for channel in pair)
    ):
        raise TypeError(f"ChannelMap: a pair is two channels (overwritten, read), got {pair!r}")
    return pair[0], pair[1]
