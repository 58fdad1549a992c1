"""Kernels of `dynamic_depthwise_conv2d` for kernels that are dilated or have a side above 7.

Mapping. A program is a tile of one plane, or of one block of channels: one shifted load for each
tap, in loops that are not unrolled.
"""

import triton
import triton.language as tl

from vfmk.kernels._depthwise_strips import RUNTIME, inside_of, program


@triton.jit
def _tile_pixels(tile, width, BLOCK_PIXELS: tl.constexpr):
    pixel = tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[:, None]
    return pixel // width, pixel % width


@triton.jit
def _load_pixels(pointers, y, x, height, width, row_stride, column_stride, mask):
    offset = y.to(tl.int64) * row_stride + x.to(tl.int64) * column_stride
    inside = mask & inside_of(y, height) & inside_of(x, width)
    return tl.load(pointers + offset, mask=inside, other=0).to(tl.float32)


@triton.jit(do_not_specialize=RUNTIME)
def forward_tiles(
    input, weight, bias, output,
    channels, height, width, output_height, output_width,
    pad_top, pad_left, dilation_h, dilation_w, tiles,
    input_batch, input_channel, input_row, input_column,
    output_batch, output_channel, output_row, output_column,
    per_sample_weight, per_sample_bias,
    KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    batch, channel, tile = program(channels, tiles, BLOCK_CHANNELS, CHANNELS_LAST)
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


@triton.jit(do_not_specialize=RUNTIME)
def backward_tiles(
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
    batch, channel, tile = program(channels, tiles, BLOCK_CHANNELS, CHANNELS_LAST)
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
