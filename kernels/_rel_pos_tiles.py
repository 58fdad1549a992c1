"""Tiles of a window's tokens in Triton: where they are, how they are read, multiplied and written.

A tile is a rectangle of ROWS x COLUMNS = T tokens. Their channels are held as parts: a tuple of
[T, wide] and, where the head width takes two powers of two, [T, narrow].
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1 / math.log(2))
LN2 = tl.constexpr(math.log(2))
SIZES = ["heads", "height", "window_height", "window_width"]  # nothing recompiles for new ones


class Head(NamedTuple):
    width: tl.constexpr
    wide: tl.constexpr
    narrow: tl.constexpr  # or 0


class Window(NamedTuple):
    batch: tl.tensor
    head: tl.tensor
    top: tl.tensor  # its first row and column in the grid
    left: tl.tensor
    rows: tl.tensor  # how many of them exist
    columns: tl.tensor


class Tile(NamedTuple):
    row: tl.tensor  # its first row and column in the window
    column: tl.tensor
    y: tl.tensor  # its tokens' rows and columns in it [T]
    x: tl.tensor
    exists: tl.tensor  # those within the window's rows and columns [T]


@triton.jit
def place(
    height, width, window_height, window_width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """This program's window, and the first row and column in it of the program's own tile."""
    tile = tl.program_id(0)
    top, left, rows, columns = 0, 0, window_height, window_width
    if WINDOWS:
        tiles = tl.cdiv(window_height, ROWS) * BLOCKS
        window = tile // tiles
        tile = tile % tiles
        across = tl.cdiv(width, window_width)
        top = window // across * window_height
        left = window % across * window_width
        rows = tl.minimum(window_height, height - top)
        columns = tl.minimum(window_width, width - left)
    row, column = tile // BLOCKS * ROWS, tile % BLOCKS * COLUMNS
    return Window(tl.program_id(2), tl.program_id(1), top, left, rows, columns), row, column


@triton.jit
def tile_at(
    window, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    token = tl.arange(0, ROWS * COLUMNS)
    y, x = token // COLUMNS, token % COLUMNS
    if MASKED:
        exists = (row + y < window.rows) & (column + x < window.columns)
    else:
        exists = tl.full([ROWS * COLUMNS], True, tl.int1)
    return Tile(row, column, y, x, exists)


@triton.jit
def offset_of(strides, batch, row, column, head):
    """Of a token, or of each where row and column are tensors."""
    offset = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[3]
    return offset + tl.cast(row, tl.int64) * strides[1] + tl.cast(column, tl.int64) * strides[2]


@triton.jit
def pointers(tensor, strides, window, tile):
    """A tile's first token, and the offsets of all from there [T], for which 32 bits are enough."""
    row, column = window.top + tile.row, window.left + tile.column
    first = tensor + offset_of(strides, window.batch, row, column, window.head)
    return first, tile.y * strides[1] + tile.x * strides[2]


@triton.jit
def indices(window, tile, width):
    """A tile's tokens [T] in a dense grid."""
    first = (window.top + tile.row) * width + window.left + tile.column
    return first + (tile.y * width + tile.x)


@triton.jit
def load(tensor, strides, pad, window, tile, HEAD: tl.constexpr):
    """A tile by pointers. In place of tokens that do not exist, the one at `pad`, or zero."""
    first, offsets = pointers(tensor, strides, window, tile)
    return _load_parts(first, offsets, pad, tile, HEAD)


@triton.jit
def load_walked(
    tensor, narrow, strides, pad, window, tile,
    HEAD: tl.constexpr, WINDOWS: tl.constexpr, BOXES: tl.constexpr,
):  # fmt: skip
    """A tile of those that a kernel walks over.

    With BOXES, `tensor` and `narrow` are descriptors of both parts: the tensor memory accelerator
    fetches them, zero beyond the grid. Otherwise `tensor` points to the window's first token.
    Tokens of the next window are zero: their weight is, but zero times NaN is not.
    """
    if BOXES:
        parts = (_load_box(tensor, window, tile, 0, HEAD.wide, WINDOWS),)
        if HEAD.narrow > 0:
            parts = parts + (_load_box(narrow, window, tile, HEAD.wide, HEAD.narrow, WINDOWS),)
    else:
        row, column = tl.cast(tile.row, tl.int64), tl.cast(tile.column, tl.int64)
        tensor += row * strides[1] + column * strides[2]
        offsets = tile.y * strides[1] + tile.x * strides[2]
        parts = _load_parts(tensor, offsets, pad, tile, HEAD)
    return parts


@triton.jit
def _load_parts(first, offsets, pad, tile, HEAD: tl.constexpr):
    parts = (_load_part(first, offsets, pad, tile, HEAD, 0, HEAD.wide),)
    if HEAD.narrow > 0:
        part = _load_part(first, offsets, pad, tile, HEAD, HEAD.wide, HEAD.narrow)
        parts = parts + (part,)
    return parts


@triton.jit
def _load_part(
    first, offsets, pad, tile,
    HEAD: tl.constexpr, CHANNEL: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = CHANNEL + tl.arange(0, CHANNELS)[None, :]
    addresses = first + (offsets[:, None] + channel)
    present = tile.exists[:, None]
    if pad is not None:
        addresses = tl.where(present, addresses, pad + channel)
        present = tl.full(present.shape, True, tl.int1)
    if HEAD.width < CHANNEL + CHANNELS:
        present = present & (channel < HEAD.width)
    return tl.load(addresses, mask=present, other=0)


@triton.jit
def _load_box(
    tensor, window, tile,
    CHANNEL: tl.constexpr, CHANNELS: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    row, column = window.top + tile.row, window.left + tile.column
    box = tensor.load([window.batch, window.head, row, column, CHANNEL])
    part = tl.reshape(box, [tile.y.shape[0], CHANNELS])
    return tl.where(tile.exists[:, None], part, 0) if WINDOWS else part


@triton.jit
def of_keys(tile, first, size, COUNT: tl.constexpr, MASKED: tl.constexpr):
    """Which of the tile's queries has a key in which of COUNT rows or columns: [T, COUNT]."""
    present = tile.exists[:, None]
    if MASKED:
        present &= (first + tl.arange(0, COUNT))[None, :] < size
    return present


@triton.jit
def load_bias(
    terms, offsets, step, unit, tile, first, size, COUNT: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Each query's bias, times `unit`, for COUNT rows (or columns) of keys from `first` on.

    They are `step` apart in memory; past `size` the bias is minus infinity. [T, COUNT]
    """
    position = (first + tl.arange(0, COUNT))[None, :]
    present = of_keys(tile, first, size, COUNT, MASKED)
    bias = tl.load(terms + (offsets + position * step), mask=present, other=0)
    bias = bias.to(tl.float32) * unit
    if MASKED:
        bias = tl.where(position < size, bias, float("-inf"))
    return bias


@triton.jit
def held(parts):
    """The same tokens, held in registers. Untouched since they were loaded, they would be read from
    shared memory for each product, and products this small are bound by that. (Float32 is not.)
    """
    result = parts
    if parts[0].dtype.primitive_bitwidth == 16:
        result = (parts[0] + 0.0,)
        if len(parts) > 1:
            result = result + (parts[1] + 0.0,)
    return result


@triton.jit
def scaled(parts, factor):
    result = (parts[0] * factor,)
    if len(parts) > 1:
        result = result + (parts[1] * factor,)
    return result


@triton.jit
def zeros(TOKENS: tl.constexpr, HEAD: tl.constexpr):
    parts = (tl.zeros([TOKENS, HEAD.wide], tl.float32),)
    if HEAD.narrow > 0:
        parts = parts + (tl.zeros([TOKENS, HEAD.narrow], tl.float32),)
    return parts


@triton.jit
def products(a, b, PRECISION: tl.constexpr):
    """Inner products of tokens a with tokens b: [A, B]."""
    total = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if len(a) > 1:
        total = tl.dot(a[1], tl.trans(b[1]), total, input_precision=PRECISION)
    return total


@triton.jit
def add_weighted(sums, weights, tokens, PRECISION: tl.constexpr):
    """sums [A, d] + weights [A, B] @ tokens [B, d]."""
    weights = weights.to(tokens[0].dtype)
    parts = (tl.dot(weights, tokens[0], sums[0], input_precision=PRECISION),)
    if len(tokens) > 1:
        parts = parts + (tl.dot(weights, tokens[1], sums[1], input_precision=PRECISION),)
    return parts


@triton.jit
def store(tensor, strides, window, tile, parts, HEAD: tl.constexpr):
    first, offsets = pointers(tensor, strides, window, tile)
    for part in tl.static_range(len(parts)):
        channel = part * HEAD.wide + tl.arange(0, parts[part].shape[1])[None, :]
        present = tile.exists[:, None]
        if HEAD.width < part * HEAD.wide + parts[part].shape[1]:
            present = present & (channel < HEAD.width)
        tl.store(first + (offsets[:, None] + channel), parts[part], mask=present)
