"""Channels in another order, scaled, in Triton.

    output[n, c, y, x] = scale[m, c] * input[n, index[m, c], y, x],  m = n // samples

`forward` and `backward` expect checked and allocated arguments: activations [N, C, rows, columns]
with column stride 1 (NCHW), else with channel stride 1 (channels-last), outputs and gradients
dense; index and scale [maps, C'], where maps divides N.

Mapping. A program owns a tile of one sample's pixels. In NCHW it has one channel, BLOCK_PIXELS
wide; in channels-last BLOCK_PIXELS pixels of BLOCK_CHANNELS channels, whose reads scatter within
the pixels' rows (which the first-level cache holds) and whose writes are dense. Backward goes by
the inverse of the map, so that each element is written once: for each input channel its readers in
ascending order, which are added up in a loop. The same loop sums grad_output times input for
grad_scale, a partial sum for each program, which are then added in a fixed order: no atomics, the
same bits on each run.

Bytes to and from memory, for N elements of s bytes in and out: forward 2Ns; backward 2Ns, with
grad_scale 3Ns. An index outside the input reads nothing and becomes NaN, and so does its gradient
of scale.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vfmk.kernels._channel_maps import inverse, is_one_row, pixel_offsets

__all__ = ["backward", "forward"]

PIXELS = 1024  # of an NCHW program: 8 elements for each of 128 threads
TILE_PIXELS, TILE_CHANNELS = 8, 128  # of a channels-last program

# These ask for no new compilation. Other sizes and strides do, once for each of whether 16 divides
# them: for 16-byte accesses.
_RUNTIME = ["samples", "columns"]


@triton.jit(do_not_specialize=_RUNTIME)
def _forward_kernel(
    input, index, scale, output,
    samples, input_channels, output_channels, columns, pixels,
    input_batch, input_channel, input_row, input_column,
    output_batch, output_channel, output_row, output_column,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles = tl.cdiv(pixels, BLOCK_PIXELS)
    blocks = tl.cdiv(output_channels, BLOCK_CHANNELS)
    if CHANNELS_LAST:  # programs that run together read all channels of the same pixels
        block = program % blocks
        tile = program // blocks % tiles
    else:
        tile = program % tiles
        block = program // tiles % blocks
    sample = (program // (tiles * blocks)).to(tl.int64)
    pixel = tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)  # [C]
    present = channel < output_channels
    entry = sample // samples * output_channels + channel
    source = tl.load(index + entry, mask=present, other=0)
    inside = (source >= 0) & (source < input_channels)
    source = tl.where(inside, source, 0)
    if scale is not None:
        factor = tl.load(scale + entry, mask=present, other=0).to(tl.float32)

    from_pixel = pixel_offsets(pixel, columns, input_row, input_column, CHANNELS_LAST, ONE_ROW)
    to_pixel = pixel_offsets(pixel, columns, output_row, output_column, CHANNELS_LAST, ONE_ROW)
    input += sample * input_batch
    output += sample * output_batch
    exists = pixel < pixels
    if CHANNELS_LAST:  # [P, C]
        mask = exists[:, None] & present[None, :]
        from_pointers = input + from_pixel[:, None] + source[None, :]
        to_pointers = output + to_pixel[:, None] + channel[None, :]
        valid = inside[None, :]
        if scale is not None:
            factor = factor[None, :]
    else:  # [C, P], one channel
        mask = present[:, None] & exists[None, :]
        from_pointers = input + (source * input_channel)[:, None] + from_pixel[None, :]
        to_pointers = output + (channel.to(tl.int64) * output_channel)[:, None] + to_pixel[None, :]
        valid = inside[:, None]
        if scale is not None:
            factor = factor[:, None]
    value = tl.load(from_pointers, mask=mask & valid, other=0)
    if scale is not None:
        value = (value.to(tl.float32) * factor).to(output.dtype.element_ty)
    # Not as a bf16 constant: the interpreter of Triton 3.8 has none.
    value = tl.where(valid, value, tl.full((1, 1), float("nan"), tl.float32).to(value.dtype))
    tl.store(to_pointers, value, mask=mask)


@triton.jit(do_not_specialize=_RUNTIME)
def _backward_kernel(
    grad_output, input, starts, readers, scale, grad_input, sums,
    samples, input_channels, output_channels, columns, pixels,
    output_batch, output_channel, output_row, output_column,
    input_batch, input_channel, input_row, input_column,
    grad_batch, grad_channel, grad_row, grad_column,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles = tl.cdiv(pixels, BLOCK_PIXELS)
    blocks = tl.cdiv(input_channels, BLOCK_CHANNELS)
    if CHANNELS_LAST:
        block = program % blocks
        tile = program // blocks % tiles
    else:
        tile = program % tiles
        block = program // tiles % blocks
    sample = (program // (tiles * blocks)).to(tl.int64)
    map = sample // samples
    pixel = tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    present = channel < input_channels
    first = tl.load(starts + map * (input_channels + 1) + channel, mask=present, other=0)
    last = tl.load(starts + map * (input_channels + 1) + channel + 1, mask=present, other=0)
    exists = pixel < pixels
    from_pixel = pixel_offsets(pixel, columns, output_row, output_column, CHANNELS_LAST, ONE_ROW)
    grad_output += sample * output_batch
    if CHANNELS_LAST:
        mask = exists[:, None] & present[None, :]
        total = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    else:
        mask = present[:, None] & exists[None, :]
        total = tl.zeros([BLOCK_CHANNELS, BLOCK_PIXELS], tl.float32)
    if sums is not None:
        own_pixel = pixel_offsets(pixel, columns, input_row, input_column, CHANNELS_LAST, ONE_ROW)
        input += sample * input_batch
        if CHANNELS_LAST:
            pointers = input + own_pixel[:, None] + channel[None, :]
        else:
            offset = channel.to(tl.int64) * input_channel
            pointers = input + offset[:, None] + own_pixel[None, :]
        own = tl.load(pointers, mask=mask, other=0).to(tl.float32)
        sums += (sample * tiles + tile) * output_channels

    for step in range(tl.max(last - first)):
        reads = first + step < last
        reader = tl.load(readers + map * output_channels + first + step, mask=reads, other=0)
        if scale is not None:
            factor = tl.load(scale + map * output_channels + reader, mask=reads, other=0)
            factor = factor.to(tl.float32)
        if CHANNELS_LAST:
            pointers = grad_output + from_pixel[:, None] + reader[None, :]
            active = mask & reads[None, :]
        else:
            offset = reader.to(tl.int64) * output_channel
            pointers = grad_output + offset[:, None] + from_pixel[None, :]
            active = mask & reads[:, None]
        gradient = tl.load(pointers, mask=active, other=0).to(tl.float32)
        if sums is not None:
            products = tl.sum(gradient * own, axis=0 if CHANNELS_LAST else 1)
            tl.store(sums + reader, products, mask=reads)
        if scale is None:
            total += gradient
        elif CHANNELS_LAST:
            total += gradient * factor[None, :]
        else:
            total += gradient * factor[:, None]

    if grad_input is not None:
        to_pixel = pixel_offsets(pixel, columns, grad_row, grad_column, CHANNELS_LAST, ONE_ROW)
        grad_input += sample * grad_batch
        if CHANNELS_LAST:
            pointers = grad_input + to_pixel[:, None] + channel[None, :]
        else:
            offset = channel.to(tl.int64) * grad_channel
            pointers = grad_input + offset[:, None] + to_pixel[None, :]
        tl.store(pointers, total.to(grad_input.dtype.element_ty), mask=mask)


def forward(
    input: Tensor, index: Tensor, scale: Tensor | None, channels_last: bool, output: Tensor
) -> None:
    if not output.numel():
        return
    if not input.shape[1]:
        output.fill_(torch.nan)
        return
    batch, channels, rows, columns = output.shape
    block_pixels, block_channels = _tile(channels_last, channels)
    programs = batch * triton.cdiv(rows * columns, block_pixels)
    with torch.cuda.device_of(input):
        _forward_kernel[programs * triton.cdiv(channels, block_channels),](
            *(input, index, scale, output),
            *(batch // index.shape[0], input.shape[1], channels, columns, rows * columns),
            *(*input.stride(), *output.stride()),
            *(block_pixels, block_channels, channels_last),
            is_one_row(channels_last, input, output),
        )


def backward(
    grad_output: Tensor,
    input: Tensor | None,
    index: Tensor,
    scale: Tensor | None,
    input_channels: int,
    channels_last: bool,
    grad_input: Tensor | None,
    grad_scale: Tensor | None,
) -> None:
    batch, channels, rows, columns = grad_output.shape
    if not grad_output.numel() or not input_channels:
        for gradient in (grad_input, grad_scale):
            if gradient is not None:
                gradient.fill_(torch.nan if gradient is grad_scale and not input_channels else 0)
        return
    maps = index.shape[0]
    block_pixels, block_channels = _tile(channels_last, input_channels)
    tiles = triton.cdiv(rows * columns, block_pixels)
    with torch.cuda.device_of(grad_output):
        starts, readers = inverse(index, input_channels)
        sums = None
        if grad_scale is not None:
            parts = (maps, batch // maps * tiles, channels)
            sums = grad_output.new_empty(parts, dtype=torch.float32)
        _backward_kernel[batch * tiles * triton.cdiv(input_channels, block_channels),](
            *(grad_output, input if sums is not None else None, starts, readers),
            *(scale, grad_input, sums),
            *(batch // maps, input_channels, channels, columns, rows * columns),
            *grad_output.stride(),
            *((0,) * 4 if input is None or sums is None else input.stride()),
            *((0,) * 4 if grad_input is None else grad_input.stride()),
            *(block_pixels, block_channels, channels_last),
            is_one_row(channels_last, grad_output, input, grad_input),
        )
        if grad_scale is not None and sums is not None:
            outside = (index < 0) | (index >= input_channels)  # nobody summed those
            grad_scale.copy_(sums.sum(1).masked_fill_(outside, torch.nan))


def _tile(channels_last: bool, channels: int) -> tuple[int, int]:
    """Pixels and channels of a program."""
    if not channels_last:
        return PIXELS, 1
    block = min(TILE_CHANNELS, triton.next_power_of_2(channels))
    return TILE_PIXELS * TILE_CHANNELS // block, block
