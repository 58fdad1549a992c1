"""Depthwise convolution with a kernel set for each sample, in Triton.

    output[b,c,y,x] = bias[b,c] + sum over i,j of
        weight[b,c,i,j] * input[b, c, y - pad_top + i*dilation_h, x - pad_left + j*dilation_w]

with zeros outside the input. `forward` and `backward` expect checked and allocated arguments: one
dtype throughout; activations with column stride 1 (NCHW), else with channel stride 1
(channels-last); dense weights, outputs and gradients.

Mapping. One thread walks down a strip of the plane, COLUMNS wide: in NCHW the columns are one
16-byte vector of one channel; in channels-last the thread owns VECTOR adjacent channels, and a warp
spans 32*VECTOR of them. A program is a block of strips of one plane, or of one block of channels.
The taps and the sums of the kh output rows that are under way stay in registers as fp32. Each step
loads ROWS rows with their kw - 1 halo columns, once, and adds them to every output row they touch;
the oldest row is then complete and leaves. Between strips the halo is re-read through L1: kw - 1
columns and, at each strip's head, kh - 1 rows.

Bytes to and from memory, N = B*C*H*W elements of s bytes: forward 2Ns + BCkhkws. Backward
3Ns + 2BCkhkws: it walks over grad_output in the same manner, with the input's rows beside it. One
halo of grad_output serves grad_input (flipped taps) and grad_weight (times the strip's own input),
so the input needs none. Each thread carries its kh*kw sums of grad_weight down the strip, and the
program adds them up in a tree. Where programs share a sum (large planes, channels-last, a kernel
set shared by the batch), each writes an fp32 partial sum, and those are added in a fixed order: no
atomics, the same bits on each run.

Kernel sides above 7 and dilated kernels take a plain path (`*_tiles`): one shifted load for each
tap, in loops that are not unrolled.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "forward", "not_supported"]

_RUNTIME = [  # sizes and strides: a new value asks for no new compilation
    *("channels", "height", "width", "output_height", "output_width"),
    *("pad_top", "pad_left", "dilation_h", "dilation_w", "tiles", "steps"),
    *("input_batch", "input_channel", "input_row", "input_column"),
    *("output_batch", "output_channel", "output_row", "output_column"),
    *("grad_batch", "grad_channel", "grad_row", "grad_column"),
    *("per_sample_weight", "per_sample_bias"),
]


@triton.jit
def _program(channels, tiles, BLOCK_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Batch item, first channel and tile of this program."""
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    if CHANNELS_LAST:  # programs that run together read all channels of the same pixels
        block = program % blocks
        tile = program // blocks % tiles
    else:
        tile = program % tiles
        block = program // tiles % blocks
    return (program // (tiles * blocks)).to(tl.int64), block * BLOCK_CHANNELS, tile


@triton.jit
def _inside(position, size):
    # A negative position wraps to a large one: one comparison instead of two.
    return position.to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def _strips(
    tile, width, strip_height,
    COLUMNS: tl.constexpr, BLOCK_STRIPS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Upper left pixels (y, x) of a tile's strips: [S], or [S, 1] in channels-last."""
    strip = tile * BLOCK_STRIPS + tl.arange(0, BLOCK_STRIPS)
    if CHANNELS_LAST:
        strip = strip[:, None]
    across = tl.cdiv(width, COLUMNS)
    return strip // across * strip_height, strip % across * COLUMNS


@triton.jit
def _pointers(
    tensor, batch, channel, y, x,
    batch_stride, channel_stride, row_stride, column_stride,
    VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Pointers to pixels (y, x): [S], or [S, C] in channels-last."""
    offset = batch * batch_stride + y.to(tl.int64) * row_stride
    if CHANNELS_LAST:
        pointers = tensor + (offset + x.to(tl.int64) * column_stride) * VECTOR + channel
    else:
        pointers = tensor + (offset + channel.to(tl.int64) * channel_stride) * VECTOR + x
    return pointers


@triton.jit
def _load_taps(
    weight, batch, channel, present, channels, per_sample,
    SHAPE: tl.constexpr, KK: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """A kernel set as a tuple of fp32: scalars, or [S, C] in channels-last."""
    weight += batch * per_sample * KK * channels
    if CHANNELS_LAST:  # weight is [B, kh*kw, C]
        pointers = tl.broadcast_to(weight + channel, SHAPE)
        step = channels
    else:  # [B, C, kh*kw]
        pointers = weight + channel * KK
        step = 1
    taps = ()
    for tap in tl.static_range(KK):
        value = tl.load(pointers + tap * step, mask=present, other=0)
        taps = taps + (value.to(tl.float32),)
    return taps


@triton.jit
def _columns(tile, COLUMNS: tl.constexpr):
    """[S, COLUMNS] as a tuple of [S]. No data moves: a thread owns all columns of its strip."""
    if COLUMNS == 1:
        columns = (tl.reshape(tile, [tile.shape[0]]),)
    else:
        even, odd = tl.split(tl.reshape(tile, [tile.shape[0], COLUMNS // 2, 2]))
        evens = _columns(even, COLUMNS // 2)
        odds = _columns(odd, COLUMNS // 2)
        columns = ()
        for m in tl.static_range(COLUMNS // 2):
            columns = columns + (evens[m], odds[m])
    return columns


@triton.jit
def _tile(columns, COLUMNS: tl.constexpr):
    """The inverse of `_columns`."""
    if COLUMNS == 1:
        tile = columns[0][:, None]
    else:
        evens = _tile(columns[0::2], COLUMNS // 2)
        odds = _tile(columns[1::2], COLUMNS // 2)
        tile = tl.reshape(tl.join(evens, odds), [columns[0].shape[0], COLUMNS])
    return tile


@triton.jit
def _load_row(
    pointers, mask, x, width, column_stride, left,
    K: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Columns x - left to x - left + COLUMNS + K - 2 of a row, as fp32; `pointers` are at x."""
    row = ()
    if CHANNELS_LAST or COLUMNS == 1:
        for m in tl.static_range(COLUMNS + K - 1):
            inside = mask & _inside(x + (m - left), width)
            step = (m - left) * column_stride.to(tl.int64) * VECTOR
            value = tl.load(pointers + step, mask=inside, other=0)
            row = row + (value.to(tl.float32),)
    else:
        for m in tl.static_range(left):
            inside = mask & (x >= left - m)
            row = row + (tl.load(pointers + (m - left), mask=inside, other=0).to(tl.float32),)
        columns = tl.arange(0, COLUMNS)[None, :]
        tile = tl.load(pointers[:, None] + columns, mask=mask[:, None], other=0)
        row = row + _columns(tile.to(tl.float32), COLUMNS)
        for m in tl.static_range(COLUMNS, COLUMNS + K - 1 - left):
            inside = mask & (x + m < width)
            row = row + (tl.load(pointers + m, mask=inside, other=0).to(tl.float32),)
    return row


@triton.jit
def _store_row(
    pointers, mask, x, width, column_stride, row,
    COLUMNS: tl.constexpr, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    if CHANNELS_LAST or COLUMNS == 1:
        for m in tl.static_range(COLUMNS):
            step = m * column_stride.to(tl.int64) * VECTOR
            tl.store(pointers + step, row[m], mask=mask & (x + m < width))
    else:
        columns = tl.arange(0, COLUMNS)[None, :]
        tl.store(pointers[:, None] + columns, _tile(row, COLUMNS), mask=mask[:, None])


@triton.jit(do_not_specialize=_RUNTIME)
def _forward_strips(
    input, weight, bias, output,
    channels, height, width, output_height, output_width, pad_top, pad_left, tiles, steps,
    input_batch, input_channel, input_row, input_column,
    output_batch, output_channel, output_row, output_column,
    per_sample_weight, per_sample_bias,
    KH: tl.constexpr, KW: tl.constexpr, SAME: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_STRIPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    batch, channel, tile = _program(channels, tiles, BLOCK_CHANNELS, CHANNELS_LAST)
    if CHANNELS_LAST:
        SHAPE: tl.constexpr = [BLOCK_STRIPS, BLOCK_CHANNELS]
        channels = channels // VECTOR * VECTOR
        channel = channel + tl.arange(0, BLOCK_CHANNELS)[None, :]
        present = channel < channels
    else:
        SHAPE: tl.constexpr = [BLOCK_STRIPS]
        present: tl.constexpr = True
    if SAME:
        top: tl.constexpr = (KH - 1) // 2
        left: tl.constexpr = (KW - 1) // 2
    else:
        top = pad_top
        left = pad_left
    strip_height = steps * ROWS - (KH - 1)
    y, x = _strips(tile, output_width, strip_height, COLUMNS, BLOCK_STRIPS, CHANNELS_LAST)
    valid = (y < output_height) & present
    source = _pointers(
        input, batch, channel, y - top, x, input_batch, input_channel, input_row, input_column,
        VECTOR, CHANNELS_LAST,
    )  # fmt: skip
    target = _pointers(
        output, batch, channel, y - (KH - 1), x,
        output_batch, output_channel, output_row, output_column, VECTOR, CHANNELS_LAST,
    )  # fmt: skip

    taps = _load_taps(
        weight, batch, channel, present, channels, per_sample_weight, SHAPE, KH * KW, CHANNELS_LAST
    )
    start = tl.zeros(SHAPE, tl.float32)
    if bias is not None:  # a tap without an input
        start += _load_taps(
            bias, batch, channel, present, channels, per_sample_bias, SHAPE, 1, CHANNELS_LAST
        )[0]
    # Of output rows y + first - (KH - 1) + q, q = 0 ... KH - 1, at the head of each step.
    sums = (start,) * (KH * COLUMNS)
    for step in range(steps):
        first = step * ROWS
        rows = ()
        for r in tl.static_range(ROWS):
            inside = valid & _inside(y - top + (first + r), height)
            row = _load_row(
                source + (first + r) * input_row.to(tl.int64) * VECTOR, inside, x, width,
                input_column, left, KW, COLUMNS, VECTOR, CHANNELS_LAST,
            )  # fmt: skip
            rows = rows + (row,)
        for r in tl.static_range(ROWS):
            previous = sums
            sums = ()
            for q in tl.static_range(KH):
                for m in tl.static_range(COLUMNS):
                    total = previous[q * COLUMNS + m]
                    for j in tl.static_range(KW):
                        total = tl.fma(taps[(KH - 1 - q) * KW + j], rows[r][m + j], total)
                    sums = sums + (total,)
            complete = y + (first + r - (KH - 1))
            inside = valid & (complete >= y) & (complete < output_height)
            _store_row(
                target + (first + r) * output_row.to(tl.int64) * VECTOR, inside, x, output_width,
                output_column, sums[:COLUMNS], COLUMNS, VECTOR, CHANNELS_LAST,
            )  # fmt: skip
            sums = sums[COLUMNS:] + (start,) * COLUMNS


@triton.jit(do_not_specialize=_RUNTIME)
def _backward_strips(
    grad_output, input, weight, grad_input, weight_sums, bias_sums,
    channels, height, width, output_height, output_width, pad_top, pad_left, tiles, steps,
    grad_batch, grad_channel, grad_row, grad_column,
    input_batch, input_channel, input_row, input_column,
    output_batch, output_channel, output_row, output_column,
    per_sample_weight,
    KH: tl.constexpr, KW: tl.constexpr, SAME: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_STRIPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    batch, channel, tile = _program(channels, tiles, BLOCK_CHANNELS, CHANNELS_LAST)
    if CHANNELS_LAST:
        SHAPE: tl.constexpr = [BLOCK_STRIPS, BLOCK_CHANNELS]
        channels = channels // VECTOR * VECTOR
        channel = channel + tl.arange(0, BLOCK_CHANNELS)[None, :]
        present = channel < channels
    else:
        SHAPE: tl.constexpr = [BLOCK_STRIPS]
        present: tl.constexpr = True
    # The padding of the flipped kernel, which leads from grad_output to grad_input.
    if SAME:
        top: tl.constexpr = KH // 2
        left: tl.constexpr = KW // 2
    else:
        top = KH - 1 - pad_top
        left = KW - 1 - pad_left
    strip_height = steps * ROWS - (KH - 1)
    y, x = _strips(tile, width, strip_height, COLUMNS, BLOCK_STRIPS, CHANNELS_LAST)
    valid = (y < height) & present
    end = tl.minimum(y + strip_height, height)
    source = _pointers(
        grad_output, batch, channel, y - top, x, grad_batch, grad_channel, grad_row, grad_column,
        VECTOR, CHANNELS_LAST,
    )  # fmt: skip

    zero = tl.zeros(SHAPE, tl.float32)
    if grad_input is not None:
        taps = _load_taps(
            weight,
            batch,
            channel,
            present,
            channels,
            per_sample_weight,
            SHAPE,
            KH * KW,
            CHANNELS_LAST,
        )
        target = _pointers(
            grad_input, batch, channel, y - (KH - 1), x,
            output_batch, output_channel, output_row, output_column, VECTOR, CHANNELS_LAST,
        )  # fmt: skip
        # Of input rows y + first - (KH - 1) + q, q = 0 ... KH - 1, at the head of each step.
        sums = (zero,) * (KH * COLUMNS)
    if weight_sums is not None:
        center = _pointers(
            input, batch, channel, y, x, input_batch, input_channel, input_row, input_column,
            VECTOR, CHANNELS_LAST,
        )  # fmt: skip
        # The same rows of the input itself, the last yet to be loaded.
        window = (zero,) * ((KH - 1) * COLUMNS)
        tap_sums = (zero,) * (KH * KW)
    if bias_sums is not None:
        bias_sum = zero

    for step in range(steps):
        first = step * ROWS
        rows = ()
        inputs = ()
        for r in tl.static_range(ROWS):
            inside = valid & _inside(y - top + (first + r), output_height)
            row = _load_row(
                source + (first + r) * grad_row.to(tl.int64) * VECTOR, inside, x, output_width,
                grad_column, left, KW, COLUMNS, VECTOR, CHANNELS_LAST,
            )  # fmt: skip
            rows = rows + (row,)
            if weight_sums is not None:
                inside = valid & (y + (first + r) < end)
                row = _load_row(
                    center + (first + r) * input_row.to(tl.int64) * VECTOR, inside, x, width,
                    input_column, 0, 1, COLUMNS, VECTOR, CHANNELS_LAST,
                )  # fmt: skip
                inputs = inputs + (row,)
        for r in tl.static_range(ROWS):
            row = rows[r]
            if grad_input is not None:
                previous = sums
                sums = ()
                for i in tl.static_range(KH):
                    for m in tl.static_range(COLUMNS):
                        total = previous[i * COLUMNS + m]
                        for j in tl.static_range(KW):
                            total = tl.fma(taps[(i + 1) * KW - 1 - j], row[m + j], total)
                        sums = sums + (total,)
                complete = y + (first + r - (KH - 1))
                inside = valid & (complete >= y) & (complete < end)
                _store_row(
                    target + (first + r) * output_row.to(tl.int64) * VECTOR, inside, x, width,
                    output_column, sums[:COLUMNS], COLUMNS, VECTOR, CHANNELS_LAST,
                )  # fmt: skip
                sums = sums[COLUMNS:] + (zero,) * COLUMNS
            if weight_sums is not None:
                window = window + inputs[r]
                previous = tap_sums
                tap_sums = ()
                for i in tl.static_range(KH):
                    for j in tl.static_range(KW):
                        total = previous[i * KW + j]
                        for m in tl.static_range(COLUMNS):
                            total = tl.fma(window[i * COLUMNS + m], row[m + KW - 1 - j], total)
                        tap_sums = tap_sums + (total,)
                window = window[COLUMNS:]
            if bias_sums is not None:  # SAME: the strip's own columns begin at KW // 2
                total = row[KW // 2]
                for m in tl.static_range(1, COLUMNS):
                    total += row[KW // 2 + m]
                own = y - top + (first + r)
                bias_sum += tl.where((own >= y) & (own < end), total, 0.0)

    part = batch * tiles + tile
    if weight_sums is not None:
        weight_sums += part * (KH * KW) * channels
        for tap in tl.static_range(KH * KW):
            if CHANNELS_LAST:  # [part, kh*kw, C]
                pointers = weight_sums + tap * channels + channel
            else:  # [part, C, kh*kw]
                pointers = weight_sums + channel * (KH * KW) + tap
            total = tl.sum(tap_sums[tap], axis=0, keep_dims=CHANNELS_LAST)
            tl.store(pointers, total, mask=present)
    if bias_sums is not None:
        total = tl.sum(bias_sum, axis=0, keep_dims=CHANNELS_LAST)
        tl.store(bias_sums + part * channels + channel, total, mask=present)


@triton.jit
def _tile_pixels(tile, width, BLOCK_PIXELS: tl.constexpr):
    pixel = tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[:, None]
    return pixel // width, pixel % width


@triton.jit
def _load_pixels(pointers, y, x, height, width, row_stride, column_stride, mask):
    offset = y.to(tl.int64) * row_stride + x.to(tl.int64) * column_stride
    inside = mask & _inside(y, height) & _inside(x, width)
    return tl.load(pointers + offset, mask=inside, other=0).to(tl.float32)


@triton.jit(do_not_specialize=_RUNTIME)
def _forward_tiles(
    input, weight, bias, output,
    channels, height, width, output_height, output_width,
    pad_top, pad_left, dilation_h, dilation_w, tiles,
    input_batch, input_channel, input_row, input_column,
    output_batch, output_channel, output_row, output_column,
    per_sample_weight, per_sample_bias,
    KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    batch, channel, tile = _program(channels, tiles, BLOCK_CHANNELS, CHANNELS_LAST)
    channel = (channel + tl.arange(0, BLOCK_CHANNELS)[None, :]).to(tl.int64)
    y, x = _tile_pixels(tile, output_width, BLOCK_PIXELS)
    present = channel < channels
    valid = (y < output_height) & present
    input += batch * input_batch + channel * input_channel
    weight += (batch * per_sample_weight * channels + channel) * (KH * KW)

    total = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    if bias is not None:
        bias += batch * per_sample_bias * channels + channel
        total += tl.load(bias, mask=present, other=0).to(tl.float32)
    for i in range(KH):
        for j in range(KW):
            value = _load_pixels(
                input, y - pad_top + i * dilation_h, x - pad_left + j * dilation_w,
                height, width, input_row, input_column, valid,
            )  # fmt: skip
            tap = tl.load(weight + i * KW + j, mask=present, other=0).to(tl.float32)
            total = tl.fma(value, tl.broadcast_to(tap, value.shape), total)
    output += batch * output_batch + channel * output_channel
    output += y.to(tl.int64) * output_row + x.to(tl.int64) * output_column
    tl.store(output, total, mask=valid)


@triton.jit(do_not_specialize=_RUNTIME)
def _backward_tiles(
    grad_output, input, weight, grad_input, weight_sums, bias_sums,
    channels, height, width, output_height, output_width,
    pad_top, pad_left, dilation_h, dilation_w, tiles,
    grad_batch, grad_channel, grad_row, grad_column,
    input_batch, input_channel, input_row, input_column,
    output_batch, output_channel, output_row, output_column,
    per_sample_weight,
    KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    batch, channel, tile = _program(channels, tiles, BLOCK_CHANNELS, CHANNELS_LAST)
    channel = (channel + tl.arange(0, BLOCK_CHANNELS)[None, :]).to(tl.int64)
    # Tiles cover both planes: the output can be the larger one, and grad_bias needs all of it.
    y, x = _tile_pixels(tile, tl.maximum(width, output_width), BLOCK_PIXELS)
    present = channel < channels
    part = (batch * tiles + tile) * channels + channel
    grad_output += batch * grad_batch + channel * grad_channel
    input += batch * input_batch + channel * input_channel
    weight += (batch * per_sample_weight * channels + channel) * (KH * KW)

    total = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    if weight_sums is not None:
        weight_sums += part * (KH * KW)
        center = _load_pixels(input, y, x, height, width, input_row, input_column, present)
    for i in range(KH):
        for j in range(KW):
            value = _load_pixels(
                grad_output, y + pad_top - i * dilation_h, x + pad_left - j * dilation_w,
                output_height, output_width, grad_row, grad_column, present,
            )  # fmt: skip
            if grad_input is not None:
                tap = tl.load(weight + i * KW + j, mask=present, other=0).to(tl.float32)
                total = tl.fma(value, tl.broadcast_to(tap, value.shape), total)
            if weight_sums is not None:
                tap_sum = tl.sum(center * value, axis=0, keep_dims=True)
                tl.store(weight_sums + i * KW + j, tap_sum, mask=present)
    if grad_input is not None:
        grad_input += batch * output_batch + channel * output_channel
        grad_input += y.to(tl.int64) * output_row + x.to(tl.int64) * output_column
        tl.store(grad_input, total, mask=present & (y < height) & (x < width))
    if bias_sums is not None:
        value = _load_pixels(
            grad_output, y, x, output_height, output_width, grad_row, grad_column, present
        )
        tl.store(bias_sums + part, tl.sum(value, axis=0, keep_dims=True), mask=present)


class _Plan(NamedTuple):
    """What a thread of the strip kernels holds."""

    rows: int  # of one step
    columns: int  # of its strip; in NCHW at most, and 16 bytes at most
    channels: int  # in channels-last, at most


# [backward, channels_last][longer kernel side, rounded up]: as much as registers hold. Nothing
# spills on any architecture; tests/kernels/test_ahead_of_time.py has the counts.
_PLANS = {
    (False, False): {3: _Plan(4, 8, 1), 5: _Plan(2, 8, 1), 7: _Plan(1, 8, 1)},
    (False, True): {3: _Plan(2, 4, 4), 5: _Plan(1, 4, 2), 7: _Plan(1, 4, 2)},
    (True, False): {3: _Plan(2, 8, 1), 5: _Plan(1, 4, 1), 7: _Plan(1, 4, 1)},
    (True, True): {3: _Plan(2, 4, 2), 5: _Plan(1, 4, 1), 7: _Plan(1, 2, 1)},
}
_LONGEST_SIDE = 7
# Strips are as long as leaves about this many threads, within bounds: at the head of a strip,
# kh - 1 rows are read and multiplied once more; a long one adds up many products in one fp32 sum.
_THREADS = 2**18
_SHORTEST_STRIP, _LONGEST_STRIP = 8, 64
_WARPS = 4
_TILE = 512  # pixels times channels of a program of the tile kernels

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Cut(NamedTuple):
    """An activation [B, C, H, W] cut into programs."""

    programs: int
    tiles: int  # of them for one plane, or for its block of channels
    steps: int  # down a strip
    vector: int  # the unit of the strides
    options: dict[str, int | bool]  # compile-time arguments of the kernel


def _ceil(size: int, block: int) -> int:
    return -(-size // block)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Four for each tensor; 0 where a dimension has one element and its stride means nothing."""
    return tuple(
        stride if size > 1 else 0
        for tensor in tensors
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _is_same(kernel_size: Sequence[int], padding: Sequence[int]) -> bool:
    kh, kw = kernel_size
    return tuple(padding) == ((kh - 1) // 2, kh // 2, (kw - 1) // 2, kw // 2)


def _fits_strips(kernel_size: Sequence[int], dilation: Sequence[int]) -> bool:
    return max(kernel_size) <= _LONGEST_SIDE and tuple(dilation) == (1, 1)


@functools.lru_cache(1024)
def _cut_strips(
    backward: bool,
    channels_last: bool,
    same: bool,
    kernel_size: tuple[int, int],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    element_size: int,
) -> _Cut:
    """Strips of an activation of this shape; `strides` are those of all activations."""
    plan = _PLANS[backward, channels_last][max(3, max(kernel_size) | 1)]
    batch, channels, height, width = shape
    dense = 1 if channels_last else 3
    steps_between_vectors = [step for index, step in enumerate(strides) if index % 4 != dense]
    if channels_last:
        columns = plan.columns
        vector = math.gcd(plan.channels, channels, *steps_between_vectors)
        lanes = min(32, triton.next_power_of_2(channels // vector))
        block_channels = lanes * vector
    else:
        # A vector of columns needs aligned rows, and a halo known at compile time.
        widest = min(plan.columns, 16 // element_size)
        columns = vector = math.gcd(widest, width, *steps_between_vectors) if same else 1
        lanes = block_channels = 1
    blocks = batch * _ceil(channels, block_channels)
    across = _ceil(width, columns)
    longest = blocks * lanes * across * height // _THREADS
    longest = min(max(longest, _SHORTEST_STRIP), _LONGEST_STRIP)
    halo = kernel_size[0] - 1
    steps = _ceil(_ceil(height, _ceil(height, longest)) + halo, plan.rows)
    strips = across * _ceil(height, steps * plan.rows - halo)
    warps = min(_WARPS, triton.next_power_of_2(_ceil(strips * lanes, 32)))
    block_strips = warps * 32 // lanes
    tiles = _ceil(strips, block_strips)
    options = {
        "KH": kernel_size[0],
        "KW": kernel_size[1],
        "SAME": same,
        "ROWS": plan.rows,
        "COLUMNS": columns,
        "VECTOR": vector,
        "BLOCK_STRIPS": block_strips,
        "BLOCK_CHANNELS": block_channels,
        "CHANNELS_LAST": channels_last,
        "num_warps": warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    return _Cut(blocks * tiles, tiles, steps, vector, options)


def _cut_tiles(
    channels_last: bool, kernel_size: tuple[int, int], batch: int, channels: int, pixels: int
) -> _Cut:
    block_channels = min(32, triton.next_power_of_2(channels)) if channels_last else 1
    tiles = _ceil(pixels, _TILE // block_channels)
    options = {
        "KH": kernel_size[0],
        "KW": kernel_size[1],
        "BLOCK_PIXELS": _TILE // block_channels,
        "BLOCK_CHANNELS": block_channels,
        "CHANNELS_LAST": channels_last,
        "num_warps": _WARPS,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    return _Cut(batch * _ceil(channels, block_channels) * tiles, tiles, 0, 1, options)


def not_supported(input: Tensor, weight: Tensor, padding: Sequence[int]) -> str:
    """Why tensors of these sizes cannot run, or ""."""
    batch, channels, height, width = input.shape
    pixels = (height + sum(padding[:2])) * (width + sum(padding[2:]))
    if pixels >= 2**30:
        return f"a plane of {pixels} pixels is too large"
    if batch * channels * _ceil(pixels, 32) >= 2**31:
        return f"{batch * channels} planes of {pixels} pixels are too many for one grid"
    return ""


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    dilation: Sequence[int],
    output: Tensor,
) -> None:
    """Write output; padding is (top, bottom, left, right), dilation (height, width)."""
    if not output.numel():
        return
    batch, channels, height, width = input.shape
    output_height, output_width = output.shape[2:]
    kernel_size = (weight.shape[2], weight.shape[3])
    channels_last = input.stride(3) != 1
    strides = _strides(input, output)
    sizes = (channels, height, width, output_height, output_width, padding[0], padding[2])
    per_sample = (int(weight.shape[0] > 1), int(bias is not None and bias.shape[0] > 1))
    with torch.cuda.device_of(input):
        if _fits_strips(kernel_size, dilation):
            same = _is_same(kernel_size, padding)
            cut = _cut_strips(
                *(False, channels_last, same, kernel_size),
                *(tuple(output.shape), strides, input.element_size()),
            )
            _forward_strips[cut.programs,](
                *(input, _channels_innermost(weight) if channels_last else weight, bias, output),
                *(*sizes, cut.tiles, cut.steps),
                *(stride // cut.vector for stride in strides),
                *per_sample,
                **cut.options,
            )
        else:
            pixels = output_height * output_width
            cut = _cut_tiles(channels_last, kernel_size, batch, channels, pixels)
            _forward_tiles[cut.programs,](
                *(input, weight, bias, output),
                *(*sizes, *dilation, cut.tiles, *strides, *per_sample),
                **cut.options,
            )


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    padding: Sequence[int],
    dilation: Sequence[int],
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Write those of grad_input, grad_weight and grad_bias that are not None."""
    batch, channels, height, width = input.shape
    output_height, output_width = grad_output.shape[2:]
    kernel_size = (weight.shape[2], weight.shape[3])
    channels_last = input.stride(3) != 1
    strips, same = _fits_strips(kernel_size, dilation), _is_same(kernel_size, padding)
    if grad_bias is not None and ((strips and not same) or not input.numel()):
        # Strips of the input do not see all of grad_output.
        _add_up(grad_output.sum((2, 3), dtype=torch.float32)[:, None], grad_bias)
        grad_bias = None
    wanted = [grad for grad in (grad_input, grad_weight, grad_bias) if grad is not None]
    if not input.numel() or not grad_output.numel():
        for grad in wanted:
            grad.zero_()
    if not wanted or not input.numel() or not grad_output.numel():
        return

    activations = (grad_output, input, input if grad_input is None else grad_input)
    strides = _strides(*activations)
    sizes = (channels, height, width, output_height, output_width, padding[0], padding[2])
    per_sample = int(weight.shape[0] > 1)
    taps_shape: tuple[int, ...] = tuple(weight.shape[1:])
    if strips:
        cut = _cut_strips(
            *(True, channels_last, same, kernel_size),
            *(tuple(input.shape), strides, input.element_size()),
        )
        if channels_last:
            taps_shape = (kernel_size[0] * kernel_size[1], channels)
            weight = weight if grad_input is None else _channels_innermost(weight)
    else:
        pixels = max(height, output_height) * max(width, output_width)
        cut = _cut_tiles(channels_last, kernel_size, batch, channels, pixels)
    with torch.cuda.device_of(input):
        weight_sums = _sums(grad_weight, (batch, cut.tiles, *taps_shape))
        bias_sums = _sums(grad_bias, (batch, cut.tiles, channels))
        tensors = (grad_output, input, weight, grad_input, weight_sums, bias_sums)
        if strips:
            _backward_strips[cut.programs,](
                *(*tensors, *sizes, cut.tiles, cut.steps),
                *(stride // cut.vector for stride in strides),
                per_sample,
                **cut.options,
            )
        else:
            _backward_tiles[cut.programs,](
                *(*tensors, *sizes, *dilation, cut.tiles, *strides, per_sample),
                **cut.options,
            )
        _add_up(weight_sums, grad_weight, channels_innermost=strips and channels_last)
        _add_up(bias_sums, grad_bias)


def _channels_innermost(weight: Tensor) -> Tensor:
    """[B, kh*kw, C], so that adjacent threads of channels-last programs read adjacent taps."""
    return weight.flatten(2).transpose(1, 2).contiguous()


def _sums(grad: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """The gradient itself where each of its items comes from one program, else fp32 parts of it."""
    batch, parts, *item = shape
    if grad is None or (parts == 1 and (batch, *item) == tuple(grad.shape)):
        return grad
    return torch.empty(shape, dtype=torch.float32, device=grad.device)


def _add_up(parts: Tensor | None, grad: Tensor | None, channels_innermost: bool = False) -> None:
    """[B, parts, ...] into the gradient: over the parts, and over a batch that shares its taps."""
    if parts is None or grad is None or parts is grad:
        return
    total = parts.sum((0, 1) if grad.shape[0] == 1 else 1)
    if channels_innermost:
        total = total.transpose(-2, -1).unflatten(-1, grad.shape[2:])
    grad.copy_(total)
