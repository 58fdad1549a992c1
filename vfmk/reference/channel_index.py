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
