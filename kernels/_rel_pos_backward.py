"""The backward kernels of `rel_pos_attention`, whose formulas and names they use.

Mapping.
`backward_prepare`: a program for each 32 tokens and head: dout . output, and the bias of each
query for each row, less its log-sum-exp, and each column, laid out as the next two read it.
`backward_queries`: the programs of the forward kernel. Queries, dout and the sum for dq stay in
registers, and dc of the columns of tiles at hand; dr leaves for memory as a tile is done with it.
`backward_keys`: a program for each tile of keys walks over the window's queries; keys, values and
the sums for dk and dv stay in registers. What stands in for keys beyond the grid leaves one sum for
each program, in fp32, and one torch sum adds them up.
`backward_relative`: turns dr and dc into the gradient of `relative`.
No atomics, and the same bits on each run.
"""

import triton
import triton.language as tl

from vfmk.kernels import _rel_pos_tiles as tiles
from vfmk.kernels._rel_pos_tiles import LOG2E, SIZES


@triton.jit(do_not_specialize=SIZES)
def backward_prepare(
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
    output += tiles.offset_of(output_strides, batch, y, x, head)[:, None]
    out = tl.load(output + channel, mask=both, other=0).to(tl.float32)
    grad_output += tiles.offset_of(grad_output_strides, batch, y, x, head)[:, None]
    grad = tl.load(grad_output + channel, mask=both, other=0).to(tl.float32)
    tl.store(delta + plane * tokens + token, tl.sum(grad * out, 1), mask=exists)

    less = tl.load(log_sum_exp + plane * tokens + token, mask=exists, other=0) * LOG2E
    relative += tiles.offset_of(relative_strides, batch, y, x, head)
    above = relative + (window_height - 1 - y % window_height)
    beside = relative + (2 * window_height - 2 + window_width - x % window_width)
    height_terms += plane * window_height * tokens
    for first in range(0, window_height, BLOCK_POSITIONS):
        i = (first + tl.arange(0, BLOCK_POSITIONS))[:, None]
        present = (i < window_height) & exists[None, :]
        bias = tl.load(above[None, :] + i, mask=present, other=0).to(tl.float32)
        tl.store(height_terms + (i * tokens + token), bias * LOG2E - less[None, :], mask=present)
    width_terms += plane * window_width * tokens
    for first in range(0, window_width, BLOCK_POSITIONS):
        j = (first + tl.arange(0, BLOCK_POSITIONS))[:, None]
        present = (j < window_width) & exists[None, :]
        bias = tl.load(beside[None, :] + j, mask=present, other=0)
        tl.store(width_terms + (j * tokens + token), bias, mask=present)


@triton.jit(do_not_specialize=SIZES)
def backward_queries(
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
    HEAD: tl.constexpr = tiles.Head(HEAD_WIDTH, WIDE, NARROW)
    window, row, column = tiles.place(
        height, width, window_height, window_width,
        QUERY_ROWS, QUERY_COLUMNS, QUERY_BLOCKS, WINDOWS,
    )  # fmt: skip
    batch, head, top, left, rows, columns = window
    if pad_key is not None:
        if (row >= rows) | (column >= columns):
            return
        pad_key += head * HEAD_WIDTH
        pad_value += head * HEAD_WIDTH
    if not BOXES:
        key += tiles.offset_of(key_strides, batch, top, left, head)
        value += tiles.offset_of(value_strides, batch, top, left, head)
    tile = tiles.tile_at(window, row, column, QUERY_ROWS, QUERY_COLUMNS, MASK_QUERIES)
    queries = tiles.load(query, query_strides, None, window, tile, HEAD)
    grads = tiles.load(grad_output, grad_output_strides, None, window, tile, HEAD)
    queries, grads = tiles.held(queries), tiles.held(grads)

    tokens = height * width
    token = tiles.indices(window, tile, width)[:, None]  # [QUERIES, 1]
    plane = (batch * heads + head).to(tl.int64)
    delta = tl.load(delta + plane * tokens + token, mask=tile.exists[:, None], other=0)
    height_terms += plane * window_height * tokens
    width_terms += plane * window_width * tokens
    sums = tiles.zeros(QUERIES, HEAD)
    for block in range(KEY_BLOCKS):
        first = block * KEY_COLUMNS
        width_bias = tiles.load_bias(
            width_terms, token, tokens, LOG2E, tile, first, window_width, KEY_COLUMNS, MASK_KEYS
        )  # [QUERIES, KEY_COLUMNS]
        width_sum = tl.zeros([QUERIES, KEY_COLUMNS], tl.float32)
        tl.assume(window_height > 0)  # a loop that may not run makes ptxas serialise wgmma
        for key_row in range(0, window_height, KEY_ROWS):
            height_bias = tiles.load_bias(
                height_terms, token, tokens, 1, tile, key_row, window_height, KEY_ROWS, MASK_KEYS
            )  # [QUERIES, KEY_ROWS]
            walked = tiles.tile_at(window, key_row, first, KEY_ROWS, KEY_COLUMNS, MASK_KEYS)
            keys = tiles.load_walked(
                key, key_narrow, key_strides, pad_key, window, walked, HEAD, WINDOWS, BOXES
            )
            values = tiles.load_walked(
                value, value_narrow, value_strides, pad_value, window, walked, HEAD, WINDOWS, BOXES
            )
            scores = tiles.products(queries, keys, PRECISION)
            scores = tl.reshape(scores, [QUERIES, KEY_ROWS, KEY_COLUMNS])
            scores = scores * (scale * LOG2E) + width_bias[:, None, :]
            weights = tl.exp2(scores + height_bias[:, :, None])
            grad_scores = tiles.products(grads, values, PRECISION) - delta
            grad_scores = tl.reshape(grad_scores, [QUERIES, KEY_ROWS, KEY_COLUMNS]) * weights
            if grad_heights is not None:
                width_sum += tl.sum(grad_scores, 1)
                offset = ((plane * KEY_BLOCKS + block) * window_height + key_row) * tokens
                from_row = tl.arange(0, KEY_ROWS)[None, :] * tokens + token
                present = tiles.of_keys(tile, key_row, window_height, KEY_ROWS, MASK_KEYS)
                tl.store(grad_heights + offset + from_row, tl.sum(grad_scores, 2), mask=present)
            if grad_query is not None:
                grad_scores = tl.reshape(grad_scores, [QUERIES, KEYS])
                sums = tiles.add_weighted(sums, grad_scores, keys, PRECISION)
        if grad_widths is not None:
            offset = (plane * window_width + first) * tokens
            from_first = tl.arange(0, KEY_COLUMNS)[None, :] * tokens + token
            present = tiles.of_keys(tile, first, window_width, KEY_COLUMNS, MASK_KEYS)
            tl.store(grad_widths + offset + from_first, width_sum, mask=present)

    if grad_query is not None:
        sums = tiles.scaled(sums, scale)
        tiles.store(grad_query, grad_query_strides, window, tile, sums, HEAD)


@triton.jit(do_not_specialize=SIZES)
def backward_keys(
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
    HEAD: tl.constexpr = tiles.Head(HEAD_WIDTH, WIDE, NARROW)
    window, row, column = tiles.place(
        height, width, window_height, window_width, KEY_ROWS, KEY_COLUMNS, KEY_BLOCKS, WINDOWS
    )
    batch, head, top, left, rows, _ = window
    tile = tiles.tile_at(window, row, column, KEY_ROWS, KEY_COLUMNS, MASK_KEYS)
    if pad_key is not None:
        pad_key += head * HEAD_WIDTH
        pad_value += head * HEAD_WIDTH
    keys = tiles.load(key, key_strides, pad_key, window, tile, HEAD)
    values = tiles.load(value, value_strides, pad_value, window, tile, HEAD)
    keys, values = tiles.held(keys), tiles.held(values)
    if not BOXES:
        query += tiles.offset_of(query_strides, batch, top, left, head)
        grad_output += tiles.offset_of(grad_output_strides, batch, top, left, head)

    tokens = height * width
    plane = (batch * heads + head).to(tl.int64)
    i = (row + tl.arange(0, KEY_ROWS))[:, None]
    j = (column + tl.arange(0, KEY_COLUMNS))[:, None]
    delta += plane * tokens
    height_terms += (plane * window_height + row) * tokens
    width_terms += (plane * window_width + column) * tokens
    from_row = tl.arange(0, KEY_ROWS)[:, None] * tokens
    from_column = tl.arange(0, KEY_COLUMNS)[:, None] * tokens
    key_sums = tiles.zeros(KEYS, HEAD)
    value_sums = tiles.zeros(KEYS, HEAD)
    for block in range(QUERY_BLOCKS):
        first = block * QUERY_COLUMNS
        tl.assume(rows > 0)  # a loop that may not run makes ptxas serialise wgmma
        for query_row in range(0, rows, QUERY_ROWS):
            walked = tiles.tile_at(
                window, query_row, first, QUERY_ROWS, QUERY_COLUMNS, MASK_QUERIES
            )
            token = tiles.indices(window, walked, width)[None, :]
            row_present = walked.exists[None, :]
            column_present = walked.exists[None, :]
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
            queries = tiles.load_walked(
                query, query_narrow, query_strides, None, window, walked, HEAD, WINDOWS, BOXES
            )
            grads = tiles.load_walked(
                grad_output, grad_output_narrow, grad_output_strides, None, window, walked,
                HEAD, WINDOWS, BOXES,
            )  # fmt: skip
            scores = tiles.products(keys, queries, PRECISION)
            scores = tl.reshape(scores, [KEY_ROWS, KEY_COLUMNS, QUERIES])
            scores = scores * scale + width_bias.to(tl.float32)[None, :, :]
            weights = tl.exp2(scores * LOG2E + height_bias[:, None, :])
            weights = tl.reshape(weights, [KEYS, QUERIES])
            if (grad_value is not None) or (grad_pad_value is not None):
                value_sums = tiles.add_weighted(value_sums, weights, grads, PRECISION)
            if (grad_key is not None) or (grad_pad_key is not None):
                deltas = tl.load(delta + token, mask=walked.exists[None, :], other=0)
                grad_scores = weights * (tiles.products(values, grads, PRECISION) - deltas)
                key_sums = tiles.add_weighted(key_sums, grad_scores, queries, PRECISION)

    key_sums = tiles.scaled(key_sums, scale)
    if grad_key is not None:
        tiles.store(grad_key, grad_key_strides, window, tile, key_sums, HEAD)
    if grad_value is not None:
        tiles.store(grad_value, grad_value_strides, window, tile, value_sums, HEAD)
    part = (batch.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * heads + head
    if grad_pad_key is not None:
        _store_pad_sum(grad_pad_key + part * HEAD_WIDTH, tile, key_sums, HEAD)
    if grad_pad_value is not None:
        _store_pad_sum(grad_pad_value + part * HEAD_WIDTH, tile, value_sums, HEAD)


@triton.jit
def _store_pad_sum(tensor, tile, parts, HEAD: tl.constexpr):
    """The sum over the tokens that do not exist. Those outside the window have no weight."""
    for part in tl.static_range(len(parts)):
        channel = part * HEAD.wide + tl.arange(0, parts[part].shape[1])
        pad_sum = tl.sum(tl.where(tile.exists[:, None], 0, parts[part]), 0)
        tl.store(tensor + channel, pad_sum, mask=channel < HEAD.width)


@triton.jit(do_not_specialize=SIZES)
def backward_relative(
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
    grad_relative += tiles.offset_of(grad_relative_strides, batch, y, x, head)[None, :]
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
