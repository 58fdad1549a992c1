"""What is asked of an index of channels on the CPU alone: elsewhere to look would stop a stream."""

from torch import Tensor


def check_range(operator: str, index: Tensor, channels: int) -> None:
    if index.device.type != "cpu" or not index.numel():
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= channels:
        raise IndexError(
            f"{operator}: index holds {low if low < 0 else high}, input has {channels} channels"
        )


def positions(operator: str, index: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """What may be gathered by, and which entries of the index lie outside; on the CPU none does."""
    if index.device.type == "cpu":
        check_range(operator, index, channels)
        return index, None
    return without_outside(index, channels)


def without_outside(index: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The index with 0 for the entries that lie outside, and which those are."""
    outside = (index < 0) | (index >= channels)
    return index.masked_fill(outside, 0), outside
