"""What kernels that read channels by an index share: where pixels are, and the inverse of a map.

`_invert` goes by counting, without a sort: the readers of channel c start where as many outputs
read a smaller channel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

INVERTED, SCANNED = 32, 64  # channels of a program of _invert, and indices that it takes at a time


def is_one_row(channels_last: bool, *activations: Tensor | None) -> bool:
    """Whether rows follow one another without a gap."""
    return all(
        activation.stride(2) == activation.shape[3] * (activation.stride(3) if channels_last else 1)
        for activation in activations
        if activation is not None
    )


@triton.jit
def pixel_offsets(
    pixel, columns, row_stride, column_stride,
    CHANNELS_LAST: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """Of pixels from the sample's first; in NCHW, columns are dense."""
    if ONE_ROW:
        row = 0
        column = pixel
    else:
        row = pixel // columns
        column = pixel % columns
    if CHANNELS_LAST:
        offset = row * tl.cast(row_stride, tl.int64) + column * tl.cast(column_stride, tl.int64)
    else:
        offset = row * tl.cast(row_stride, tl.int64) + column
    return offset


def inverse(index: Tensor, input_channels: int) -> tuple[Tensor, Tensor]:
    """starts [maps, C + 1] and readers [maps, C'] of index [maps, C'], int32.

    The readers of channel c, in ascending order, end where those of c + 1 start.
    """
    maps, output_channels = index.shape
    starts = index.new_empty((maps, input_channels + 1), dtype=torch.int32)
    readers = index.new_empty((maps, output_channels), dtype=torch.int32)
    _invert[maps * triton.cdiv(input_channels + 1, INVERTED),](
        index, starts, readers, input_channels, output_channels, INVERTED, SCANNED
    )
    return starts, readers


@triton.jit(do_not_specialize=["input_channels", "output_channels"])
def _invert(
    index, starts, readers, input_channels, output_channels,
    BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """starts [maps, C + 1] and readers [maps, C']; those of c end where those of c + 1 start."""
    blocks = tl.cdiv(input_channels + 1, BLOCK)
    map = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    index += map * output_channels
    starts += map * (input_channels + 1)
    readers += map * output_channels
    smaller = tl.zeros([BLOCK], tl.int32)
    for first in range(0, output_channels, SCAN):
        reader = first + tl.arange(0, SCAN)
        read = tl.load(index + reader, mask=reader < output_channels, other=2**62)
        smaller += tl.sum((read[None, :] < channel[:, None]).to(tl.int32), axis=1)
    tl.store(starts + channel, smaller, mask=channel <= input_channels)
    place = smaller
    for first in range(0, output_channels, SCAN):
        reader = first + tl.arange(0, SCAN)
        read = tl.load(index + reader, mask=reader < output_channels, other=2**62)
        reads = (read[None, :] == channel[:, None]) & (channel[:, None] < input_channels)
        count = reads.to(tl.int32)
        before = tl.cumsum(count, axis=1) - count
        targets = readers + place[:, None] + before
        values = tl.broadcast_to(reader[None, :], [BLOCK, SCAN])
        tl.store(targets, values, mask=reads)
        place += tl.sum(count, axis=1)
