"""The order of images, as a function of the seed and a position, and what is done to each."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

Key = tuple[int, int]  # epoch and index
Pair = tuple[Tensor, dict[str, Any]]
Transform = Callable[[Any, Any], Pair]


class StreamSampler(Sampler[list[Key]]):
    """Batches of keys out of one endless stream: epoch after epoch in a new order each.

    Batch b takes the positions from b·batch_size on; each process takes every `processes`-th batch,
    so that processes together see what one with a batch as large as theirs together sees. Where the
    stream stands is an integer, the batches begun by all processes.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        first: int,
        stop: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.batches = range(first + process, stop, processes)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, torch.empty(0)
        for batch in self.batches:
            keys = []
            for position in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = torch.randperm(self.length, generator=_generator(self.seed, epoch))
                keys.append((epoch, int(order[position % self.length])))
            yield keys


class TrainingImages(Dataset[Pair]):
    """Images transformed at random; what comes out is a function of the seed and the key, whichever
    process and worker asks, and whatever was asked before."""

    def __init__(
        self,
        dataset: Any,
        transform: Transform,
        prepare: Callable[[dict[str, Any], np.random.Generator], dict[str, Any]],
        seed: int,
    ) -> None:
        self.dataset, self.transform, self.prepare = dataset, transform, prepare
        self.seed = seed

    def __getitem__(self, key: Key) -> Pair:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(_generator(self.seed, epoch, index).get_state())
            image, target = self.transform(*self.dataset[index])
        rng = np.random.default_rng((self.seed, epoch, index))
        return image, self.prepare(target, rng)


class EvaluationImages(Dataset[Pair]):
    """Images transformed without chance; target["truth"] is the target before that."""

    def __init__(
        self,
        dataset: Any,
        transform: Transform,
        prepare: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        self.dataset, self.transform, self.prepare = dataset, transform, prepare

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Pair:
        image, truth = self.dataset[index]
        padded, target = self.transform(image, truth)
        return padded, self.prepare({**target, "truth": truth})


def _generator(*seed: int) -> torch.Generator:
    (mixed,) = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))
