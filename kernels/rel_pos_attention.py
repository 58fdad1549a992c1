"""Attention inside windows of a token grid, with decomposed relative position, in Triton.

With r_i the product of a query with its distance to key row i and c_j to key column j (`relative`
holds them for all distances), and each window attending within itself:

    p_ij = softmax over (i, j) of scale * q . k_ij + r_i + c_j    output = sum of p_ij v_ij

The gradient, with ds_ij = p_ij (dout . v_ij - dout . output):

    dq = scale * sum of ds_ij k_ij    dk_ij = scale * sum over queries of ds_ij q
    dr_i = sum over j of ds_ij        dc_j = sum over i of ds_ij
    dv_ij = sum over queries of p_ij dout

Mapping. A tile is a rectangle of a window's tokens, so that the bias of a tile of scores is two
slim matrices, and nothing of N x N is stored. A program for each tile of queries, head and batch
item walks over the window's keys by columns of tiles, then down them; queries, the running maximum,
the sum of weights and the weighted sum of values stay in registers, the bias of the tile's columns
too. Backward, and the sums that it keeps: `_rel_pos_backward.py`.

Floor, for T = B * heads * H * W tokens of s bytes an element, windows of n = rows * columns.
Forward: 4Tds bytes, T(2 rows + 2 columns)s of `relative`, 4Tnd FLOP, Tn exponentials; keys and
values are re-read through L2, once for each tile of queries. Backward: 8Tds bytes, `relative` twice
more, T(rows + columns) numbers between the kernels, written once and read twice, 14Tnd FLOP, 2Tn
exponentials.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vfmk.kernels import _rel_pos_tiles as tiles
from vfmk.kernels._rel_pos_backward import (
    backward_keys,
    backward_prepare,
    backward_queries,
    backward_relative,
)
from vfmk.kernels._rel_pos_plan import MOST_OWN, near, plan_launch, strides
from vfmk.kernels._rel_pos_tiles import LN2, LOG2E, SIZES

__all__ = ["backward", "forward", "not_supported"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDEST_HEAD = 128
_BLOCK_TOKENS, _BLOCK_POSITIONS = 32, 32  # of the kernels before and after the backward ones


@triton.jit(do_not_specialize=SIZES)
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
    relative, offsets = tiles.pointers(relative, relative_strides, window, tile)
    above = relative + (window_height - 1 - row)
    above_offsets = (offsets - tile.y)[:, None]
    beside = relative + (2 * window_height - 1 + window_width - 1 - column)
    beside_offsets = (offsets - tile.x)[:, None]

    # Scores and their maximum are exponents of two.
    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tiles.zeros(QUERIES, HEAD)
    for block in range(KEY_BLOCKS):
        first = block * KEY_COLUMNS
        width_bias = tiles.load_bias(
            beside, beside_offsets, 1, LOG2E, tile, first, window_width, KEY_COLUMNS, MASK_KEYS
        )  # [QUERIES, KEY_COLUMNS]
        tl.assume(window_height > 0)  # a loop that may not run makes ptxas serialise wgmma
        for key_row in range(0, window_height, KEY_ROWS):
            height_bias = tiles.load_bias(
                above, above_offsets, 1, LOG2E, tile, key_row, window_height, KEY_ROWS, MASK_KEYS
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
            # A row of keys shares its height bias: it moves the maximum instead of the scores.
            previous = maximum
            maximum = tl.maximum(previous, tl.max(tl.max(scores, 2) + height_bias, 1))
            weights = tl.exp2(scores - (maximum[:, None] - height_bias)[:, :, None])
            weights = tl.reshape(weights, [QUERIES, KEYS])
            fade = tl.exp2(previous - maximum)
            sums = tiles.scaled(sums, fade[:, None])
            sums = tiles.add_weighted(sums, weights, values, PRECISION)
            total = total * fade + tl.sum(weights, 1)

    sums = tiles.scaled(sums, 1 / total[:, None])
    tiles.store(output, output_strides, window, tile, sums, HEAD)
    log_sum_exp += (batch * heads + head).to(tl.int64) * height * width
    token = (top + row + tile.y) * width + left + column + tile.x
    tl.store(log_sum_exp + token, (maximum + tl.log2(total)) * LN2, mask=tile.exists)


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
    most_rows = MOST_OWN // min(16, triton.next_power_of_2(window_size[1]))
    widest = max(head_width, 2 * sum(window_size) - 2)  # of the numbers of a query
    across_tile = (most_rows * width + MOST_OWN) * heads * widest
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
    query, key, value = map(near, (query, key, value))
    with torch.cuda.device_of(query):
        plan = plan_launch("forward", query, window_size, pad_key is not None, (key, value))
        _forward[plan.grid](
            *(query, *plan.walked, relative, pad_key, pad_value, output, log_sum_exp),
            *(strides(tensor) for tensor in (query, key, value, relative, output)),
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
    grad_output, query, key, value = map(near, (grad_output, query, key, value))
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
        backward_prepare[token_blocks](
            *(grad_output, output, relative, log_sum_exp, height_terms, width_terms, delta),
            *(strides(tensor) for tensor in (grad_output, output, relative)),
            *sizes,
            HEAD_WIDTH=head_width,
            CHANNELS=triton.next_power_of_2(head_width),
            **blocks,
        )
        if any(grad is not None for grad in of_keys):
            plan = plan_launch("backward_keys", query, window_size, padded, (grad_output, query))
            parts_shape = (batch, plan.grid[0], heads, head_width)
            pad_parts = [
                None
                if grad is None
                else torch.empty(parts_shape, dtype=torch.float32, device=query.device)
                for grad in (grad_pad_key, grad_pad_value)
            ]
            backward_keys[plan.grid](
                *(*plan.walked, key, value, pad_key, pad_value),
                *(height_terms, width_terms, delta, grad_key, grad_value, *pad_parts),
                *map(strides, (grad_output, query, key, value, grad_key, grad_value)),
                *(*sizes, scale),
                **plan.options,
            )
            for grad, parts in zip((grad_pad_key, grad_pad_value), pad_parts, strict=True):
                if grad is not None:
                    grad.copy_(parts.sum((0, 1)))
        if any(grad is not None for grad in of_queries):
            plan = plan_launch("backward_queries", query, window_size, padded, (key, value))
            grad_heights = grad_widths = None
            if grad_relative is not None:
                grad_heights = scratch(plan.options["KEY_BLOCKS"], window_size[0])
                grad_widths = scratch(window_size[1])
            backward_queries[plan.grid](
                *(grad_output, query, *plan.walked, pad_key, pad_value),
                *(height_terms, width_terms, delta, grad_query, grad_heights, grad_widths),
                *map(strides, (grad_output, query, key, value, grad_query)),
                *(*sizes, scale),
                **plan.options,
            )
            if grad_relative is not None:
                backward_relative[token_blocks](
                    *(grad_heights, grad_widths, grad_relative, strides(grad_relative)),
                    *sizes,
                    KEY_BLOCKS=plan.options["KEY_BLOCKS"],
                    **blocks,
                )
