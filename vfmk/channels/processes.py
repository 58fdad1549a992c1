"""What the processes of torch.distributed say to one another; one alone says it to itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def agreed(value: Any) -> Any:
    """The first process's."""
    if world_size() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


@contextmanager
def failing_together(*errors: type[Exception]) -> Iterator[None]:
    """What the first process finds wrong inside stops them all."""
    own = None
    try:
        yield
    except errors as found:
        own = found
    if error := agreed(own):
        error.by_all = True  # for the commands, which then print it once
        raise error
    if own:
        raise own


def gathered(value: Any) -> list[Any]:
    """Each process's."""
    values = [value] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def summed(tensor: Tensor) -> Tensor:
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
