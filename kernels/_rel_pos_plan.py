"""Which tiles, warps and grid a launch of `rel_pos_attention`'s kernels gets, by shape and GPU."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vfmk.kernels._strides import strides_of


class _Tile(NamedTuple):
    """What a program holds at a time."""

    own: int  # tokens of the tile it is there for
    walked: int  # tokens of a tile of its loop
    warps: int
    stages: int
    precision: str = "tf32x3"  # of products of float32


# By kernel, then by head width: the first that is as wide. Nothing spills on any architecture
# (tests/kernels/test_ahead_of_time_rel_pos_attention.py). Where tensor cores run beside the warps
# (sm_90, sm_100) they ask for 64 tokens in the loop, and for two programs on a multiprocessor, so
# that one multiplies while the other exponentiates.
_ASYNC = {
    "forward": {64: _Tile(128, 64, 8, 3), 128: _Tile(64, 64, 4, 2)},
    "backward_queries": {80: _Tile(64, 64, 4, 2), 128: _Tile(64, 32, 4, 2)},
    "backward_keys": {80: _Tile(64, 64, 4, 2), 128: _Tile(64, 32, 4, 2)},
}
_ASYNC_PADDED = {
    "forward": {128: _Tile(64, 64, 4, 2)},
    "backward_queries": {128: _Tile(64, 32, 4, 2)},
    "backward_keys": {80: _Tile(64, 32, 4, 2), 128: _Tile(64, 16, 4, 2)},
}
_SYNC = {
    "forward": {64: _Tile(128, 64, 8, 3), 128: _Tile(64, 32, 4, 2)},
    "backward_queries": {128: _Tile(64, 32, 4, 2)},
    "backward_keys": {64: _Tile(64, 32, 4, 2), 128: _Tile(64, 16, 4, 2)},
}
_FLOAT32 = {64: _Tile(64, 16, 8, 2), 128: _Tile(32, 16, 4, 2, "ieee")}

MOST_OWN = 128


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def _tile(kernel: str, query: Tensor, padded: bool) -> _Tile:
    if query.dtype == torch.float32:
        tiles = _FLOAT32
    elif capability(query.device)[0] not in (9, 10):
        tiles = _SYNC[kernel]
    else:
        tiles = (_ASYNC_PADDED if padded else _ASYNC)[kernel]
    return next(tiles[width] for width in tiles if query.shape[-1] <= width)


def _shape(tokens: int, window_size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tile: those that cover the window with the fewest tokens."""
    height, width = window_size
    columns = min(16, tokens, triton.next_power_of_2(width))
    shapes = []
    while columns <= tokens:
        rows = tokens // columns
        covered = triton.cdiv(height, rows) * rows * triton.cdiv(width, columns) * columns
        shapes.append((covered, -columns, (rows, columns)))
        columns *= 2
    return min(shapes)[2]


def _parts(head_width: int) -> tuple[int, int]:
    """Head width as two powers of two, the second 0 where one will do."""
    wide = max(16, 1 << (head_width.bit_length() - 1))
    rest = head_width - wide
    return wide, max(16, triton.next_power_of_2(rest)) if rest > 0 else 0


def strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Of all but the last dimension."""
    return (0,) * 4 if tensor is None else strides_of(tensor, dimensions=4)


def near(tensor: Tensor) -> Tensor:
    """The tensor, or a dense copy where 32 bits do not reach across a tile."""
    return tensor if MOST_OWN * sum(strides(tensor)[1:3]) < 2**31 else tensor.contiguous()


def _fits_box(tensor: Tensor) -> bool:
    """Whether the tensor memory accelerator can fetch it: 16-byte steps, none of them zero."""
    vector = 16 // tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and all(
        size == 1 or (stride > 0 and stride % vector == 0)
        for size, stride in zip(tensor.shape[:4], tensor.stride()[:4], strict=True)
    )


def _box(tensor: Tensor, shape: Sequence[int], channels: int) -> TensorDescriptor:
    """[B, heads, H, W, d], fetched `shape` tokens and `channels` channels at a time."""
    order = (0, 3, 1, 2)
    steps = strides(tensor)
    return TensorDescriptor(
        tensor,
        [tensor.shape[axis] for axis in order] + [tensor.shape[4]],
        [steps[axis] or 16 for axis in order] + [1],
        [1, 1, *shape, channels],
    )


class Plan(NamedTuple):
    grid: tuple[int, int, int]
    walked: list[Tensor | TensorDescriptor | None]  # two arguments for each tensor: both its parts
    options: dict[str, int | bool | str]  # compile-time arguments of the kernel


def plan_launch(
    kernel: str, query: Tensor, window_size: Sequence[int], padded: bool, walked: Sequence[Tensor]
) -> Plan:
    batch, height, width, heads, head_width = query.shape
    tile = _tile(kernel, query, padded)
    wide, narrow = _parts(head_width)
    own, other = _shape(tile.own, window_size), _shape(tile.walked, window_size)
    keys, queries = (own, other) if kernel == "backward_keys" else (other, own)

    def blocks(shape: tuple[int, int]) -> tuple[int, int]:
        return tuple(triton.cdiv(size, step) for size, step in zip(window_size, shape, strict=True))

    def masked(shape: tuple[int, int]) -> bool:
        return padded or any(
            size % step != 0 for size, step in zip(window_size, shape, strict=True)
        )

    boxes = (
        query.element_size() == 2
        and capability(query.device)[0] in (9, 10)
        and not (padded and kernel != "backward_keys")
        and all(_fits_box(tensor) for tensor in walked)
    )
    arguments: list[Tensor | TensorDescriptor | None] = []
    for tensor in walked:
        if boxes:
            arguments.append(_box(tensor, other, wide))
            arguments.append(_box(tensor, other, narrow) if narrow else None)
        else:
            arguments += [tensor, None]
    windows = triton.cdiv(height, window_size[0]) * triton.cdiv(width, window_size[1])
    options = {
        "HEAD_WIDTH": head_width,
        "WIDE": wide,
        "NARROW": narrow,
        "PRECISION": tile.precision,
        "QUERY_ROWS": queries[0],
        "QUERY_COLUMNS": queries[1],
        "QUERY_BLOCKS": blocks(queries)[1],
        "KEY_ROWS": keys[0],
        "KEY_COLUMNS": keys[1],
        "KEY_BLOCKS": blocks(keys)[1],
        "MASK_QUERIES": masked(queries),
        "MASK_KEYS": masked(keys),
        "WINDOWS": tuple(window_size) != (height, width),
        "BOXES": boxes,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }
    return Plan((windows * math.prod(blocks(own)), heads, batch), arguments, options)
