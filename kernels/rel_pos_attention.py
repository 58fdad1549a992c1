"""Attention inside windows of a token grid, with decomposed relative position, in Triton.

With r_i the product of a query with its distance to key row i and c_j to key column j (`relative`
holds them for all distances), and each window attending within itself:

    p_ij = softmax over (i, j) of scale * q . k_ij + r_i + c_j    output = sum of p_ij v_ij

The gradient, with ds_ij = p_ij (dout . v_ij - dout . output):

    dq = scale * sum of ds_ij k_ij    dk_ij = scale * sum over queries of ds_ij q
    dr_i = sum over j of ds_ij        dc_j = sum over i of ds_ij
    dv_ij = sum over queries of p_ij dout

Mapping. A tile is a rectangle of a window's tokens, so that the bias of a tile of scores is two
slim matrices, and nothing of N x N is stored. Head widths are two powers of two.
`_forward`: a program for each tile of queries, head and batch item walks over the window's keys by
columns of tiles, then down them; queries, the running maximum, the sum of weights and the weighted
sum of values stay in registers, the bias of the tile's columns too.
`_backward_prepare`: a program for each 32 tokens and head: dout . output, and the bias of each
query for each row, less its log-sum-exp, and each column, laid out as the next two read it.
`_backward_queries`: the programs of `_forward`. Queries, dout and the sum for dq stay in registers,
and dc of the columns of tiles at hand; dr leaves for memory as each tile is done with it.
`_backward_keys`: a program for each tile of keys walks over the window's queries; keys, values and
the sums for dk and dv stay in registers. What stands in for keys beyond the grid leaves one sum for
each program, in fp32, and one torch sum adds them up.
`_backward_relative`: turns dr and dc into the gradient of `relative`.
No atomics, and the same bits on each run.

Floor, for T = B * heads * H * W tokens of s bytes an element, windows of n = rows * columns.
Forward: 4Tds bytes, T(2 rows + 2 columns)s of `relative`, 4Tnd FLOP, Tn exponentials; keys and
values are re-read through L2, once for each tile of queries. Backward: 8Tds bytes, `relative` twice
more, T(rows + columns) numbers between the kernels, written once and read twice, 14Tnd FLOP, 2Tn
exponentials.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["backward", "forward", "not_supported"]

_LOG2E = tl.constexpr(1 / math.log(2))
_LN2 = tl.constexpr(math.log(2))
_SIZES = ["heads", "height", "window_height", "window_width"]  # nothing recompiles for new ones


@triton.jit
def _place(
    height, width, window_height, window_width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """This program's batch item, head, window and tile.

    The window: its first row and column in the grid, and how many rows and columns of it exist.
    The tile: its first row and column in the window.
    """
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
    return tl.program_id(2), tl.program_id(1), top, left, rows, columns, row, column


@triton.jit
def _tokens(
    row, column, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tokens of the tile at (row, column): their rows and columns in it [T], and which exist [T].

    T = ROWS * COLUMNS. Those within rows x columns exist; all do, if not MASKED.
    """
    token = tl.arange(0, ROWS * COLUMNS)
    y, x = token // COLUMNS, token % COLUMNS
    if MASKED:
        exists = (row + y < rows) & (column + x < columns)
    else:
        exists = tl.full([ROWS * COLUMNS], True, tl.int1)
    return y, x, exists


@triton.jit
def _first(strides, batch, row, column, head):
    """Offset of a tile's first token. Within a tile, 32 bits are enough (`_near`)."""
    offset = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[3]
    return offset + tl.cast(row, tl.int64) * strides[1] + tl.cast(column, tl.int64) * strides[2]


@triton.jit
def _channels(exists, HEAD_WIDTH: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Channels [1, COUNT] of one part of the head width, and `exists` [T] with theirs."""
    channel = FIRST + tl.arange(0, COUNT)[None, :]
    present = exists[:, None]
    if FIRST + COUNT > HEAD_WIDTH:
        present = present & (channel < HEAD_WIDTH)
    return channel, present


@triton.jit
def _load(
    tensor, offsets, exists, HEAD_WIDTH: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr
):
    """Tokens at `offsets` [T] as their parts: a tuple of [T, WIDE] and, if any, [T, NARROW]."""
    channel, present = _channels(exists, HEAD_WIDTH, 0, WIDE)
    parts = (tl.load(tensor + (offsets[:, None] + channel), mask=present, other=0),)
    if NARROW > 0:
        channel, present = _channels(exists, HEAD_WIDTH, WIDE, NARROW)
        parts = parts + (tl.load(tensor + (offsets[:, None] + channel), mask=present, other=0),)
    return parts


@triton.jit
def _load_or_pad(
    tensor, offsets, pad, exists,
    HEAD_WIDTH: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """The same, with the one token at `pad` in place of those that do not exist."""
    every = tl.full(exists.shape, True, tl.int1)
    channel, present = _channels(every, HEAD_WIDTH, 0, WIDE)
    pointers = tl.where(exists[:, None], tensor + (offsets[:, None] + channel), pad + channel)
    parts = (tl.load(pointers, mask=present, other=0),)
    if NARROW > 0:
        channel, present = _channels(every, HEAD_WIDTH, WIDE, NARROW)
        pointers = tl.where(exists[:, None], tensor + (offsets[:, None] + channel), pad + channel)
        parts = parts + (tl.load(pointers, mask=present, other=0),)
    return parts


@triton.jit
def _present(parts, exists):
    """Zero in place of the tokens that do not exist."""
    present = (tl.where(exists[:, None], parts[0], 0),)
    if len(parts) > 1:
        present = present + (tl.where(exists[:, None], parts[1], 0),)
    return present


@triton.jit
def _load_walked(
    tensor, narrow, strides, pad, batch, head, top, left, row, column, rows, columns,
    HEAD_WIDTH: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
    WINDOWS: tl.constexpr, BOXES: tl.constexpr,
):  # fmt: skip
    """A tile of the tokens that a kernel walks over, at (row, column) of the window.

    With BOXES, `tensor` and `narrow` are descriptors of both parts: the tensor memory accelerator
    fetches them, zero beyond the grid. Otherwise `tensor` points to the window's first token.
    Tokens of the next window are zero: their weight is, but zero times NaN is not.
    """
    if BOXES:
        box = tensor.load([batch, head, top + row, left + column, 0])
        parts = (tl.reshape(box, [ROWS * COLUMNS, WIDE]),)
        if NARROW > 0:
            box = narrow.load([batch, head, top + row, left + column, WIDE])
            parts = parts + (tl.reshape(box, [ROWS * COLUMNS, NARROW]),)
        if WINDOWS and MASKED:
            _, _, exists = _tokens(row, column, rows, columns, ROWS, COLUMNS, MASKED)
            parts = _present(parts, exists)
    else:
        y, x, exists = _tokens(row, column, rows, columns, ROWS, COLUMNS, MASKED)
        tensor += tl.cast(row, tl.int64) * strides[1] + tl.cast(column, tl.int64) * strides[2]
        offsets = y * strides[1] + x * strides[2]
        if pad is not None:
            parts = _load_or_pad(tensor, offsets, pad, exists, HEAD_WIDTH, WIDE, NARROW)
        else:
            parts = _load(tensor, offsets, exists, HEAD_WIDTH, WIDE, NARROW)
    return parts


@triton.jit
def _zeros(TOKENS: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr):
    parts = (tl.zeros([TOKENS, WIDE], tl.float32),)
    if NARROW > 0:
        parts = parts + (tl.zeros([TOKENS, NARROW], tl.float32),)
    return parts


@triton.jit
def _products(a, b, PRECISION: tl.constexpr):
    """Inner products of tokens a with tokens b: [A, B]."""
    total = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if len(a) > 1:
        total = tl.dot(a[1], tl.trans(b[1]), total, input_precision=PRECISION)
    return total


@triton.jit
def _add_weighted(sums, weights, tokens, PRECISION: tl.constexpr):
    """sums [A, d] + weights [A, B] @ tokens [B, d]."""
    weights = weights.to(tokens[0].dtype)
    parts = (tl.dot(weights, tokens[0], sums[0], input_precision=PRECISION),)
    if len(tokens) > 1:
        parts = parts + (tl.dot(weights, tokens[1], sums[1], input_precision=PRECISION),)
    return parts


@triton.jit
def _held(parts):
    """The same tokens, held in registers. Untouched since they were loaded, they would be read from
    shared memory for each product, and products this small are bound by that. (Float32 is not.)
    """
    held = parts
    if parts[0].dtype.primitive_bitwidth == 16:
        held = (parts[0] + 0.0,)
        if len(parts) > 1:
            held = held + (parts[1] + 0.0,)
    return held


@triton.jit
def _scaled(parts, factor):
    scaled = (parts[0] * factor,)
    if len(parts) > 1:
        scaled = scaled + (parts[1] * factor,)
    return scaled


@triton.jit
def _store(tensor, offsets, exists, parts, HEAD_WIDTH: tl.constexpr):
    WIDE: tl.constexpr = parts[0].shape[1]
    channel, present = _channels(exists, HEAD_WIDTH, 0, WIDE)
    tl.store(tensor + (offsets[:, None] + channel), parts[0], mask=present)
    if len(parts) > 1:
        channel, present = _channels(exists, HEAD_WIDTH, WIDE, parts[1].shape[1])
        tl.store(tensor + (offsets[:, None] + channel), parts[1], mask=present)


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    query, key, key_narrow, value, value_narrow, relative, pad_key, pad_value, output, log_sum_exp,
    query_strides, key_strides, value_strides, relative_strides, output_strides,
    heads, height, width, window_height, window_width, scale,
    HEAD_WIDTH: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
    QUERY_ROWS: tl.constexpr, QUERY_COLUMNS: tl.constexpr, QUERY_BLOCKS: tl.constexpr,
    KEY_ROWS: tl.constexpr, KEY_COLUMNS: tl.constexpr, KEY_BLOCKS: tl.constexpr,
    MASK_QUERIES: tl.constexpr, MASK_KEYS: tl.constexpr,
    WINDOWS: tl.constexpr, BOXES: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = QUERY_ROWS * QUERY_COLUMNS
    KEYS: tl.constexpr = KEY_ROWS * KEY_COLUMNS
    batch, head, top, left, rows, columns, row, column = _place(
        height, width, window_height, window_width,
        QUERY_ROWS, QUERY_COLUMNS, QUERY_BLOCKS, WINDOWS,
    )  # fmt: skip
    if pad_key is not None:
        if (row >= rows) | (column >= columns):
            return
        pad_key += head * HEAD_WIDTH
        pad_value += head * HEAD_WIDTH
    if not BOXES:
        key += _first(key_strides, batch, top, left, head)
        value += _first(value_strides, batch, top, left, head)
    y, x, exists = _tokens(row, column, rows, columns, QUERY_ROWS, QUERY_COLUMNS, MASK_QUERIES)
    query += _first(query_strides, batch, top + row, left + column, head)
    offsets = y * query_strides[1] + x * query_strides[2]
    queries = _load(query, offsets, exists, HEAD_WIDTH, WIDE, NARROW)
    relative += _first(relative_strides, batch, top + row, left + column, head)
    offsets = y * relative_strides[1] + x * relative_strides[2]
    above = relative + (window_height - 1 - row)
    beside = relative + (2 * window_height - 1 + window_width - 1 - column)
    above_offsets = (offsets - y)[:, None]
    beside_offsets = (offsets - x)[:, None]

    # Scores and their maximum are exponents of two.
    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = _zeros(QUERIES, WIDE, NARROW)
    for block in range(KEY_BLOCKS):
        first = block * KEY_COLUMNS
        j = (first + tl.arange(0, KEY_COLUMNS))[None, :]
        column_present = exists[:, None]
        if MASK_KEYS:
            column_present &= j < window_width
        width_bias = tl.load(beside + (beside_offsets + j), mask=column_present, other=0)
        width_bias = width_bias.to(tl.float32) * _LOG2E  # [QUERIES, KEY_COLUMNS]
        if MASK_KEYS:
            width_bias = tl.where(j < window_width, width_bias, float("-inf"))
        tl.assume(window_height > 0)  # a loop that may not run makes ptxas serialise wgmma
        for key_row in range(0, window_height, KEY_ROWS):
            i = (key_row + tl.arange(0, KEY_ROWS))[None, :]
            row_present = exists[:, None]
            if MASK_KEYS:
                row_present &= i < window_height
            height_bias = tl.load(above + (above_offsets + i), mask=row_present, other=0)
            height_bias = height_bias.to(tl.float32) * _LOG2E  # [QUERIES, KEY_ROWS]
            if MASK_KEYS:
                height_bias = tl.where(i < window_height, height_bias, float("-inf"))
            keys = _load_walked(
                key, key_narrow, key_strides, pad_key, batch, head, top, left, key_row, first,
                rows, columns, HEAD_WIDTH, WIDE, NARROW, KEY_ROWS, KEY_COLUMNS, MASK_KEYS,
                WINDOWS, BOXES,
            )  # fmt: skip
            values = _load_walked(
                value, value_narrow, value_strides, pad_value, batch, head, top, left, key_row,
                first, rows, columns, HEAD_WIDTH, WIDE, NARROW, KEY_ROWS, KEY_COLUMNS, MASK_KEYS,
                WINDOWS, BOXES,
            )  # fmt: skip
            scores = _products(queries, keys, PRECISION)
            scores = tl.reshape(scores, [QUERIES, KEY_ROWS, KEY_COLUMNS])
            scores = scores * (scale * _LOG2E) + width_bias[:, None, :]
            # A row of keys shares its height bias: it moves the maximum instead of the scores.
            previous = maximum
            maximum = tl.maximum(previous, tl.max(tl.max(scores, 2) + height_bias, 1))
            weights = tl.exp2(scores - (maximum[:, None] - height_bias)[:, :, None])
            weights = tl.reshape(weights, [QUERIES, KEYS])
            fade = tl.exp2(previous - maximum)
            sums = _add_weighted(_scaled(sums, fade[:, None]), weights, values, PRECISION)
            total = total * fade + tl.sum(weights, 1)

    output += _first(output_strides, batch, top + row, left + column, head)
    offsets = y * output_strides[1] + x * output_strides[2]
    _store(output, offsets, exists, _scaled(sums, 1 / total[:, None]), HEAD_WIDTH)
    log_sum_exp += (batch * heads + head).to(tl.int64) * height * width
    offsets = (top + row + y) * width + left + column + x
    tl.store(log_sum_exp + offsets, (maximum + tl.log2(total)) * _LN2, mask=exists)


@triton.jit(do_not_specialize=_SIZES)
def _backward_prepare(
    grad_output, output, relative, log_sum_exp, height_terms, width_terms, delta,
    grad_output_strides, output_strides, relative_strides,
    heads, height, width, window_height, window_width,
    HEAD_WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
):  # fmt: skip
    """delta, and the bias of each query for each row and each column of its window.

    height_terms [B, heads, window_height, H * W] are exponents of two, less the log-sum-exp;
    width_terms [B, heads, window_width, H * W] are copies.
    """
    batch, head = tl.program_id(2), tl.program_id(1)
    tokens = height * width
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    exists = token < tokens
    y, x = token // width, token % width
    plane = (batch * heads + head).to(tl.int64)

    channel = tl.arange(0, CHANNELS)[None, :]
    both = exists[:, None] & (channel < HEAD_WIDTH)
    output += _first(output_strides, batch, 0, 0, head)
    offsets = y.to(tl.int64) * output_strides[1] + x.to(tl.int64) * output_strides[2]
    out = tl.load(output + (offsets[:, None] + channel), mask=both, other=0).to(tl.float32)
    grad_output += _first(grad_output_strides, batch, 0, 0, head)
    offsets = y.to(tl.int64) * grad_output_strides[1] + x.to(tl.int64) * grad_output_strides[2]
    grad = tl.load(grad_output + (offsets[:, None] + channel), mask=both, other=0)
    tl.store(delta + plane * tokens + token, tl.sum(grad.to(tl.float32) * out, 1), mask=exists)

    less = tl.load(log_sum_exp + plane * tokens + token, mask=exists, other=0) * _LOG2E
    relative += _first(relative_strides, batch, 0, 0, head)
    offsets = y.to(tl.int64) * relative_strides[1] + x.to(tl.int64) * relative_strides[2]
    above = relative + (offsets + (window_height - 1 - y % window_height))[None, :]
    beside = (
        relative + (offsets + (2 * window_height - 2 + window_width - x % window_width))[None, :]
    )
    height_terms += plane * window_height * tokens
    for first in range(0, window_height, BLOCK_POSITIONS):
        i = (first + tl.arange(0, BLOCK_POSITIONS))[:, None]
        present = (i < window_height) & exists[None, :]
        bias = tl.load(above + i, mask=present, other=0).to(tl.float32)
        tl.store(height_terms + (i * tokens + token), bias * _LOG2E - less[None, :], mask=present)
    width_terms += plane * window_width * tokens
    for first in range(0, window_width, BLOCK_POSITIONS):
        j = (first + tl.arange(0, BLOCK_POSITIONS))[:, None]
        present = (j < window_width) & exists[None, :]
        bias = tl.load(beside + j, mask=present, other=0)
        tl.store(width_terms + (j * tokens + token), bias, mask=present)


@triton.jit(do_not_specialize=_SIZES)
def _backward_queries(
    grad_output, query, key, key_narrow, value, value_narrow, pad_key, pad_value,
    height_terms, width_terms, delta, grad_query, grad_heights, grad_widths,
    grad_output_strides, query_strides, key_strides, value_strides, grad_query_strides,
    heads, height, width, window_height, window_width, scale,
    HEAD_WIDTH: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
    QUERY_ROWS: tl.constexpr, QUERY_COLUMNS: tl.constexpr, QUERY_BLOCKS: tl.constexpr,
    KEY_ROWS: tl.constexpr, KEY_COLUMNS: tl.constexpr, KEY_BLOCKS: tl.constexpr,
    MASK_QUERIES: tl.constexpr, MASK_KEYS: tl.constexpr,
    WINDOWS: tl.constexpr, BOXES: tl.constexpr,
):  # fmt: skip
    """grad_query, and the gradient of each query's bias for each row and each column.

    grad_heights [B, heads, KEY_BLOCKS, window_height, H * W] and grad_widths
    [B, heads, window_width, H * W] are fp32.
    """
    QUERIES: tl.constexpr = QUERY_ROWS * QUERY_COLUMNS
    KEYS: tl.constexpr = KEY_ROWS * KEY_COLUMNS
    batch, head, top, left, rows, columns, row, column = _place(
        height, width, window_height, window_width,
        QUERY_ROWS, QUERY_COLUMNS, QUERY_BLOCKS, WINDOWS,
    )  # fmt: skip
    if pad_key is not None:
        if (row >= rows) | (column >= columns):
            return
        pad_key += head * HEAD_WIDTH
        pad_value += head * HEAD_WIDTH
    if not BOXES:
        key += _first(key_strides, batch, top, left, head)
        value += _first(value_strides, batch, top, left, head)
    y, x, exists = _tokens(row, column, rows, columns, QUERY_ROWS, QUERY_COLUMNS, MASK_QUERIES)
    query += _first(query_strides, batch, top + row, left + column, head)
    offsets = y * query_strides[1] + x * query_strides[2]
    queries = _load(query, offsets, exists, HEAD_WIDTH, WIDE, NARROW)
    grad_output += _first(grad_output_strides, batch, top + row, left + column, head)
    offsets = y * grad_output_strides[1] + x * grad_output_strides[2]
    grads = _load(grad_output, offsets, exists, HEAD_WIDTH, WIDE, NARROW)
    queries, grads = _held(queries), _held(grads)

    tokens = height * width
    token = ((top + row) * width + left + column + y * width + x)[:, None]  # [QUERIES, 1]
    plane = (batch * heads + head).to(tl.int64)
    delta = tl.load(delta + plane * tokens + token, mask=exists[:, None], other=0)
    height_terms += plane * window_height * tokens
    width_terms += plane * window_width * tokens
    sums = _zeros(QUERIES, WIDE, NARROW)
    for block in range(KEY_BLOCKS):
        first = block * KEY_COLUMNS
        j = (first + tl.arange(0, KEY_COLUMNS))[None, :]
        column_present = exists[:, None]
        if MASK_KEYS:
            column_present &= j < window_width
        width_bias = tl.load(width_terms + (j * tokens + token), mask=column_present, other=0)
        width_bias = width_bias.to(tl.float32) * _LOG2E  # [QUERIES, KEY_COLUMNS]
        if MASK_KEYS:
            width_bias = tl.where(j < window_width, width_bias, float("-inf"))
        width_sum = tl.zeros([QUERIES, KEY_COLUMNS], tl.float32)
        tl.assume(window_height > 0)  # a loop that may not run makes ptxas serialise wgmma
        for key_row in range(0, window_height, KEY_ROWS):
            i = (key_row + tl.arange(0, KEY_ROWS))[None, :]
            row_present = exists[:, None]
            if MASK_KEYS:
                row_present &= i < window_height
            height_bias = tl.load(height_terms + (i * tokens + token), mask=row_present, other=0)
            if MASK_KEYS:
                height_bias = tl.where(i < window_height, height_bias, float("-inf"))
            keys = _load_walked(
                key, key_narrow, key_strides, pad_key, batch, head, top, left, key_row, first,
                rows, columns, HEAD_WIDTH, WIDE, NARROW, KEY_ROWS, KEY_COLUMNS, MASK_KEYS,
                WINDOWS, BOXES,
            )  # fmt: skip
            values = _load_walked(
                value, value_narrow, value_strides, pad_value, batch, head, top, left, key_row,
                first, rows, columns, HEAD_WIDTH, WIDE, NARROW, KEY_ROWS, KEY_COLUMNS, MASK_KEYS,
                WINDOWS, BOXES,
            )  # fmt: skip
            scores = _products(queries, keys, PRECISION)
            scores = tl.reshape(scores, [QUERIES, KEY_ROWS, KEY_COLUMNS])
            scores = scores * (scale * _LOG2E) + width_bias[:, None, :]
            weights = tl.exp2(scores + height_bias[:, :, None])
            grad_scores = _products(grads, values, PRECISION) - delta
            grad_scores = tl.reshape(grad_scores, [QUERIES, KEY_ROWS, KEY_COLUMNS]) * weights
            if grad_heights is not None:
                width_sum += tl.sum(grad_scores, 1)
                offset = ((plane * KEY_BLOCKS + block) * window_height + key_row) * tokens
                from_row = tl.arange(0, KEY_ROWS)[None, :] * tokens + token
                tl.store(grad_heights + offset + from_row, tl.sum(grad_scores, 2), mask=row_present)
            if grad_query is not None:
                grad_scores = tl.reshape(grad_scores, [QUERIES, KEYS])
                sums = _add_weighted(sums, grad_scores, keys, PRECISION)
        if grad_widths is not None:
            offset = (plane * window_width + first) * tokens
            from_first = tl.arange(0, KEY_COLUMNS)[None, :] * tokens + token
            tl.store(grad_widths + offset + from_first, width_sum, mask=column_present)

    if grad_query is not None:
        grad_query += _first(grad_query_strides, batch, top + row, left + column, head)
        offsets = y * grad_query_strides[1] + x * grad_query_strides[2]
        _store(grad_query, offsets, exists, _scaled(sums, scale), HEAD_WIDTH)


@triton.jit(do_not_specialize=_SIZES)
def _backward_keys(
    grad_output, grad_output_narrow, query, query_narrow, key, value, pad_key, pad_value,
    height_terms, width_terms, delta, grad_key, grad_value, grad_pad_key, grad_pad_value,
    grad_output_strides, query_strides, key_strides, value_strides,
    grad_key_strides, grad_value_strides,
    heads, height, width, window_height, window_width, scale,
    HEAD_WIDTH: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
    QUERY_ROWS: tl.constexpr, QUERY_COLUMNS: tl.constexpr, QUERY_BLOCKS: tl.constexpr,
    KEY_ROWS: tl.constexpr, KEY_COLUMNS: tl.constexpr, KEY_BLOCKS: tl.constexpr,
    MASK_QUERIES: tl.constexpr, MASK_KEYS: tl.constexpr,
    WINDOWS: tl.constexpr, BOXES: tl.constexpr,
):  # fmt: skip
    """grad_key and grad_value, and of the pads the sum within each program, fp32.

    grad_pad_key and grad_pad_value are [B, programs, heads, HEAD_WIDTH].
    """
    QUERIES: tl.constexpr = QUERY_ROWS * QUERY_COLUMNS
    KEYS: tl.constexpr = KEY_ROWS * KEY_COLUMNS
    batch, head, top, left, rows, columns, row, column = _place(
        height, width, window_height, window_width, KEY_ROWS, KEY_COLUMNS, KEY_BLOCKS, WINDOWS
    )
    y, x, exists = _tokens(row, column, rows, columns, KEY_ROWS, KEY_COLUMNS, MASK_KEYS)
    key += _first(key_strides, batch, top + row, left + column, head)
    value += _first(value_strides, batch, top + row, left + column, head)
    key_offsets = y * key_strides[1] + x * key_strides[2]
    value_offsets = y * value_strides[1] + x * value_strides[2]
    if pad_key is not None:
        pad_key += head * HEAD_WIDTH
        pad_value += head * HEAD_WIDTH
        keys = _load_or_pad(key, key_offsets, pad_key, exists, HEAD_WIDTH, WIDE, NARROW)
        values = _load_or_pad(value, value_offsets, pad_value, exists, HEAD_WIDTH, WIDE, NARROW)
    else:
        keys = _load(key, key_offsets, exists, HEAD_WIDTH, WIDE, NARROW)
        values = _load(value, value_offsets, exists, HEAD_WIDTH, WIDE, NARROW)
    keys, values = _held(keys), _held(values)
    if not BOXES:
        query += _first(query_strides, batch, top, left, head)
        grad_output += _first(grad_output_strides, batch, top, left, head)

    tokens = height * width
    plane = (batch * heads + head).to(tl.int64)
    i = (row + tl.arange(0, KEY_ROWS))[:, None]
    j = (column + tl.arange(0, KEY_COLUMNS))[:, None]
    delta += plane * tokens
    height_terms += (plane * window_height + row) * tokens
    width_terms += (plane * window_width + column) * tokens
    from_row = tl.arange(0, KEY_ROWS)[:, None] * tokens
    from_column = tl.arange(0, KEY_COLUMNS)[:, None] * tokens
    key_sums = _zeros(KEYS, WIDE, NARROW)
    value_sums = _zeros(KEYS, WIDE, NARROW)
    for block in range(QUERY_BLOCKS):
        first = block * QUERY_COLUMNS
        tl.assume(rows > 0)  # a loop that may not run makes ptxas serialise wgmma
        for query_row in range(0, rows, QUERY_ROWS):
            query_y, query_x, exist = _tokens(
                query_row, first, rows, columns, QUERY_ROWS, QUERY_COLUMNS, MASK_QUERIES
            )
            token = (top + query_row) * width + left + first + (query_y * width + query_x)[None, :]
            row_present = exist[None, :]
            column_present = exist[None, :]
            if MASK_KEYS:
                row_present = row_present & (i < window_height)
                column_present = column_present & (j < window_width)
            # Minus infinity: queries and keys that do not exist have no weight.
            height_bias = tl.load(
                height_terms + (from_row + token), mask=row_present, other=float("-inf")
            )  # [KEY_ROWS, QUERIES]
            width_bias = tl.load(
                width_terms + (from_column + token), mask=column_present, other=float("-inf")
            )  # [KEY_COLUMNS, QUERIES]
            queries = _load_walked(
                query, query_narrow, query_strides, None, batch, head, top, left, query_row, first,
                rows, columns, HEAD_WIDTH, WIDE, NARROW, QUERY_ROWS, QUERY_COLUMNS, MASK_QUERIES,
                WINDOWS, BOXES,
            )  # fmt: skip
            grads = _load_walked(
                grad_output, grad_output_narrow, grad_output_strides, None, batch, head, top, left,
                query_row, first, rows, columns, HEAD_WIDTH, WIDE, NARROW, QUERY_ROWS,
                QUERY_COLUMNS, MASK_QUERIES, WINDOWS, BOXES,
            )  # fmt: skip
            scores = _products(keys, queries, PRECISION)
            scores = tl.reshape(scores, [KEY_ROWS, KEY_COLUMNS, QUERIES])
            scores = scores * scale + width_bias.to(tl.float32)[None, :, :]
            weights = tl.exp2(scores * _LOG2E + height_bias[:, None, :])
            weights = tl.reshape(weights, [KEYS, QUERIES])
            if (grad_value is not None) or (grad_pad_value is not None):
                value_sums = _add_weighted(value_sums, weights, grads, PRECISION)
            if (grad_key is not None) or (grad_pad_key is not None):
                deltas = tl.load(delta + token, mask=exist[None, :], other=0)
                grad_scores = weights * (_products(values, grads, PRECISION) - deltas)
                key_sums = _add_weighted(key_sums, grad_scores, queries, PRECISION)

    key_sums = _scaled(key_sums, scale)
    y, x, exists = _tokens(row, column, rows, columns, KEY_ROWS, KEY_COLUMNS, MASK_KEYS)
    if grad_key is not None:
        grad_key += _first(grad_key_strides, batch, top + row, left + column, head)
        offsets = y * grad_key_strides[1] + x * grad_key_strides[2]
        _store(grad_key, offsets, exists, key_sums, HEAD_WIDTH)
    if grad_value is not None:
        grad_value += _first(grad_value_strides, batch, top + row, left + column, head)
        offsets = y * grad_value_strides[1] + x * grad_value_strides[2]
        _store(grad_value, offsets, exists, value_sums, HEAD_WIDTH)
    part = (batch.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * heads + head
    if grad_pad_key is not None:
        _store_pad_sum(grad_pad_key + part * HEAD_WIDTH, exists, key_sums, HEAD_WIDTH)
    if grad_pad_value is not None:
        _store_pad_sum(grad_pad_value + part * HEAD_WIDTH, exists, value_sums, HEAD_WIDTH)


@triton.jit
def _store_pad_sum(tensor, exists, parts, HEAD_WIDTH: tl.constexpr):
    """The sum over the tokens that do not exist. Those outside the window have no weight."""
    WIDE: tl.constexpr = parts[0].shape[1]
    channel = tl.arange(0, WIDE)
    pad_sum = tl.sum(tl.where(exists[:, None], 0, parts[0]), 0)
    tl.store(tensor + channel, pad_sum, mask=channel < HEAD_WIDTH)
    if len(parts) > 1:
        channel = WIDE + tl.arange(0, parts[1].shape[1])
        pad_sum = tl.sum(tl.where(exists[:, None], 0, parts[1]), 0)
        tl.store(tensor + channel, pad_sum, mask=channel < HEAD_WIDTH)


@triton.jit(do_not_specialize=_SIZES)
def _backward_relative(
    grad_heights, grad_widths, grad_relative, grad_relative_strides,
    heads, height, width, window_height, window_width,
    KEY_BLOCKS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
):  # fmt: skip
    """grad_relative: zero where no key refers to it."""
    batch, head = tl.program_id(2), tl.program_id(1)
    tokens = height * width
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    exists = (token < tokens)[None, :]
    y, x = token // width, token % width
    plane = (batch * heads + head).to(tl.int64)
    grad_heights += plane * KEY_BLOCKS * window_height * tokens
    grad_widths += plane * window_width * tokens
    grad_relative += _first(grad_relative_strides, batch, 0, 0, head)
    grad_relative += (
        y.to(tl.int64) * grad_relative_strides[1] + x.to(tl.int64) * grad_relative_strides[2]
    )[None, :]
    heights, widths = 2 * window_height - 1, 2 * window_width - 1
    for first in range(0, heights, BLOCK_POSITIONS):
        position = (first + tl.arange(0, BLOCK_POSITIONS))[:, None]
        i = position - (window_height - 1 - y % window_height)[None, :]
        present = exists & (i >= 0) & (i < window_height)
        total = tl.zeros([BLOCK_POSITIONS, BLOCK_TOKENS], tl.float32)
        of_block = grad_heights
        for _ in range(KEY_BLOCKS):
            offsets = i * tokens + token[None, :]
            total += tl.load(of_block + offsets, mask=present, other=0)
            of_block += window_height * tokens
        tl.store(grad_relative + position, total, mask=exists & (position < heights))
    for first in range(0, widths, BLOCK_POSITIONS):
        position = (first + tl.arange(0, BLOCK_POSITIONS))[:, None]
        j = position - (window_width - 1 - x % window_width)[None, :]
        present = exists & (j >= 0) & (j < window_width)
        total = tl.load(grad_widths + (j * tokens + token[None, :]), mask=present, other=0)
        tl.store(grad_relative + (heights + position), total, mask=exists & (position < widths))


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

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDEST_HEAD = 128
_MOST_OWN = 128
_BLOCK_TOKENS, _BLOCK_POSITIONS = 32, 32  # of the kernels before and after the backward ones


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def _tile(kernel: str, query: Tensor, padded: bool) -> _Tile:
    if query.dtype == torch.float32:
        tiles = _FLOAT32
    elif _capability(query.device)[0] not in (9, 10):
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


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Of all but the last dimension; 0 where a dimension has one element and its stride no use."""
    if tensor is None:
        return (0,) * 4
    return tuple(
        stride if size > 1 else 0
        for size, stride in zip(tensor.shape[:4], tensor.stride()[:4], strict=True)
    )


def _near(tensor: Tensor) -> Tensor:
    """The tensor, or a dense copy where 32 bits do not reach across a tile."""
    return tensor if _MOST_OWN * sum(_strides(tensor)[1:3]) < 2**31 else tensor.contiguous()


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
    strides = _strides(tensor)
    return TensorDescriptor(
        tensor,
        [tensor.shape[axis] for axis in order] + [tensor.shape[4]],
        [strides[axis] or 16 for axis in order] + [1],
        [1, 1, *shape, channels],
    )


class _Plan(NamedTuple):
    grid: tuple[int, int, int]
    walked: list[Tensor | TensorDescriptor | None]  # two arguments for each tensor: both its parts
    options: dict[str, int | bool | str]  # compile-time arguments of the kernel


def _plan(
    kernel: str, query: Tensor, window_size: Sequence[int], padded: bool, walked: Sequence[Tensor]
) -> _Plan:
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
        and _capability(query.device)[0] in (9, 10)
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
    return _Plan((windows * math.prod(blocks(own)), heads, batch), arguments, options)


def not_supported(query: Tensor, window_size: Sequence[int]) -> str:
    """Why query [B, H, W, heads, d] and what belongs to it cannot run here, or ""."""
    batch, height, width, heads, head_width = query.shape
    if query.dtype not in _DTYPES:
        return f"dtype is {query.dtype}, not float32, float16 or bfloat16"
    if head_width > _WIDEST_HEAD:
        return f"head width {head_width} is above {_WIDEST_HEAD}"
    if max(batch, heads) >= 2**16 or batch * heads >= 2**31:
        return f"a batch of {batch} with {heads} heads is too large for one grid"
    # Offsets within a head's bias, and from a tile's first token to its last, have 32 bits.
    most_rows = _MOST_OWN // min(16, triton.next_power_of_2(window_size[1]))
    widest = max(head_width, 2 * sum(window_size) - 2)  # of the numbers of a query
    across_tile = (most_rows * width + _MOST_OWN) * heads * widest
    if max(height * width * max(window_size), across_tile) >= 2**31:
        return (
            f"a grid of {height} x {width} tokens in windows of"
            f" {window_size[0]} x {window_size[1]}, with {heads} heads, is too large"
        )
    return ""


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    relative: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    window_size: Sequence[int],
    scale: float,
    output: Tensor,
    log_sum_exp: Tensor,
) -> None:
    """Write output and log_sum_exp [B, heads, H, W], natural and with the bias in it."""
    if not query.numel():
        return
    _, height, width, heads, _ = query.shape
    query, key, value = map(_near, (query, key, value))
    with torch.cuda.device_of(query):
        plan = _plan("forward", query, window_size, pad_key is not None, (key, value))
        _forward[plan.grid](
            *(query, *plan.walked, relative, pad_key, pad_value, output, log_sum_exp),
            *(_strides(tensor) for tensor in (query, key, value, relative, output)),
            *(heads, height, width, *window_size, scale),
            **plan.options,
        )


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    relative: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    output: Tensor,
    log_sum_exp: Tensor,
    window_size: Sequence[int],
    scale: float,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    grad_relative: Tensor | None,
    grad_pad_key: Tensor | None,
    grad_pad_value: Tensor | None,
) -> None:
    """Write those gradients that are not None."""
    of_queries = (grad_query, grad_relative)
    of_keys = (grad_key, grad_value, grad_pad_key, grad_pad_value)
    if not query.numel():
        for grad in (grad_pad_key, grad_pad_value):
            if grad is not None:
                grad.zero_()
        return
    batch, height, width, heads, head_width = query.shape
    grad_output, query, key, value = map(_near, (grad_output, query, key, value))
    padded = pad_key is not None
    sizes = (heads, height, width, *window_size)

    def scratch(*positions: int, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = (batch, heads, *positions, height * width)
        return torch.empty(shape, dtype=dtype, device=query.device)

    delta = scratch()
    height_terms = scratch(window_size[0])
    width_terms = scratch(window_size[1], dtype=relative.dtype)
    token_blocks = (triton.cdiv(height * width, _BLOCK_TOKENS), heads, batch)
    blocks = {
        "BLOCK_TOKENS": _BLOCK_TOKENS,
        "BLOCK_POSITIONS": _BLOCK_POSITIONS,
        "enable_fp_fusion": True,
    }
    with torch.cuda.device_of(query):
        _backward_prepare[token_blocks](
            *(grad_output, output, relative, log_sum_exp, height_terms, width_terms, delta),
            *(_strides(tensor) for tensor in (grad_output, output, relative)),
            *sizes,
            HEAD_WIDTH=head_width,
            CHANNELS=triton.next_power_of_2(head_width),
            **blocks,
        )
        if any(grad is not None for grad in of_keys):
            plan = _plan("backward_keys", query, window_size, padded, (grad_output, query))
            parts_shape = (batch, plan.grid[0], heads, head_width)
            pad_parts = [
                None
                if grad is None
                else torch.empty(parts_shape, dtype=torch.float32, device=query.device)
                for grad in (grad_pad_key, grad_pad_value)
            ]
            _backward_keys[plan.grid](
                *(*plan.walked, key, value, pad_key, pad_value),
                *(height_terms, width_terms, delta, grad_key, grad_value, *pad_parts),
                *map(_strides, (grad_output, query, key, value, grad_key, grad_value)),
                *(*sizes, scale),
                **plan.options,
            )
            for grad, parts in zip((grad_pad_key, grad_pad_value), pad_parts, strict=True):
                if grad is not None:
                    grad.copy_(parts.sum((0, 1)))
        if any(grad is not None for grad in of_queries):
            plan = _plan("backward_queries", query, window_size, padded, (key, value))
            grad_heights = grad_widths = None
            if grad_relative is not None:
                grad_heights = scratch(plan.options["KEY_BLOCKS"], window_size[0])
                grad_widths = scratch(window_size[1])
            _backward_queries[plan.grid](
                *(grad_output, query, *plan.walked, pad_key, pad_value),
                *(height_terms, width_terms, delta, grad_query, grad_heights, grad_widths),
                *map(_strides, (grad_output, query, key, value, grad_query)),
                *(*sizes, scale),
                **plan.options,
            )
            if grad_relative is not None:
                _backward_relative[token_blocks](
                    *(grad_heights, grad_widths, grad_relative, _strides(grad_relative)),
                    *sizes,
                    KEY_BLOCKS=plan.options["KEY_BLOCKS"],
                    **blocks,
                )
