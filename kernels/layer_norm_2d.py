"""Layer norm over channels with a gather in its write, in Triton.

    output[b, c, y, x] = weight[i] * (input[b, i, y, x] - mean) * rstd + bias[i],  i = index[c]

The gradient, with g_i = weight_i * (sum of the gradients of the outputs that read i) and n the
normalized input:

    dinput_i = rstd * (g_i - mean of g - n_i * mean of (g * n)),  means over the channels
    dbias_i = sum over pixels of g_i / weight_i,  dweight_i = sum over pixels of n_i g_i / weight_i

`forward` and `backward` expect checked and allocated arguments: activations [B, C, rows, columns]
with column stride 1 (NCHW), else with channel stride 1 (channels-last), outputs and gradients
dense; mean and rstd [B, rows, columns].

Mapping. A program owns a tile of one sample's pixels and goes through its channels, a block at a
time: for the mean, for the variance about it, and, in the order of the output, to write. The tile
comes from memory once, and then from the first-level cache, which has room for it. Backward goes by
the inverse of the map: for each input channel its readers in ascending order. It goes through the
channels twice, for the means and for the gradient. Each program leaves its sums for weight and bias
in fp32, and one torch sum adds them up: no atomics, the same bits on each run.

Bytes to and from memory, for N elements of s bytes in and out: forward 2Ns and 8 bytes a pixel;
backward 3Ns, and 8C bytes for each program's sums. An index outside the input reads nothing and
becomes NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vfmk.kernels._channel_maps import inverse, is_one_row, pixel_offsets

__all__ = ["backward", "forward"]

BYTES = 128  # of a row of an NCHW tile: one line of the cache
CHANNELS = 64  # at most, of a block of NCHW
TILE_PIXELS, TILE_CHANNELS = 16, 128  # of a channels-last block

# These ask for no new compilation. Other sizes and strides do, once for each of whether 16 divides
# them: for 16-byte accesses.
_RUNTIME = ["columns"]


@triton.jit
def _pointers(tensor, channel, pixel_offset, channel_stride, CHANNELS_LAST: tl.constexpr):
    """[C, P]."""
    offset = channel if CHANNELS_LAST else channel.to(tl.int64) * channel_stride
    return tensor + (offset[:, None] + pixel_offset[None, :])


@triton.jit(do_not_specialize=_RUNTIME)
def _forward(
    input, weight, bias, index, output, mean, rstd, eps,
    input_channels, output_channels, columns, pixels,
    input_batch, input_channel, input_row, input_column,
    output_batch, output_channel, output_row, output_column,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(pixels, BLOCK_PIXELS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    exists = pixel < pixels
    from_pixel = pixel_offsets(pixel, columns, input_row, input_column, CHANNELS_LAST, ONE_ROW)
    to_pixel = pixel_offsets(pixel, columns, output_row, output_column, CHANNELS_LAST, ONE_ROW)
    input += sample * input_batch
    output += sample * output_batch

    total = tl.zeros([BLOCK_PIXELS], tl.float32)
    for first in range(0, input_channels, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS)
        present = (channel < input_channels)[:, None] & exists[None, :]
        pointers = _pointers(input, channel, from_pixel, input_channel, CHANNELS_LAST)
        total += tl.sum(tl.load(pointers, mask=present, other=0).to(tl.float32), axis=0)
    average = total / input_channels

    squares = tl.zeros([BLOCK_PIXELS], tl.float32)
    for first in range(0, input_channels, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS)
        present = (channel < input_channels)[:, None] & exists[None, :]
        pointers = _pointers(input, channel, from_pixel, input_channel, CHANNELS_LAST)
        value = tl.load(pointers, mask=present, other=0).to(tl.float32)
        centred = tl.where(present, value - average[None, :], 0)
        squares += tl.sum(centred * centred, axis=0)
    scale = 1 / tl.sqrt_rn(squares / input_channels + eps)
    place = sample * pixels + pixel
    tl.store(mean + place, average, mask=exists)
    tl.store(rstd + place, scale, mask=exists)

    for first in range(0, output_channels, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS)
        written = channel < output_channels
        if index is None:
            source = channel
            inside = written
        else:
            source = tl.load(index + channel, mask=written, other=0)
            inside = written & (source >= 0) & (source < input_channels)
            source = tl.where(inside, source, 0)
        pointers = _pointers(input, source, from_pixel, input_channel, CHANNELS_LAST)
        value = tl.load(pointers, mask=inside[:, None] & exists[None, :], other=0).to(tl.float32)
        factor = tl.load(weight + source, mask=inside, other=float("nan")).to(tl.float32)
        shift = tl.load(bias + source, mask=inside, other=0).to(tl.float32)
        normalized = (value - average[None, :]) * scale[None, :]
        result = normalized * factor[:, None] + shift[:, None]
        pointers = _pointers(output, channel, to_pixel, output_channel, CHANNELS_LAST)
        result = result.to(output.dtype.element_ty)
        tl.store(pointers, result, mask=written[:, None] & exists[None, :])


@triton.jit
def _gradient(
    grad_output, starts, readers, channel, present, exists, from_pixel, output_channel,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """What the readers of channels send back, [C, P]; starts None: each channel's own."""
    if starts is None:
        pointers = _pointers(grad_output, channel, from_pixel, output_channel, CHANNELS_LAST)
        mask = present[:, None] & exists[None, :]
        gradient = tl.load(pointers, mask=mask, other=0).to(tl.float32)
    else:
        gradient = tl.zeros([channel.shape[0], from_pixel.shape[0]], tl.float32)
        first = tl.load(starts + channel, mask=present, other=0)
        last = tl.load(starts + channel + 1, mask=present, other=0)
        for step in range(tl.max(last - first)):
            reads = first + step < last
            reader = tl.load(readers + first + step, mask=reads, other=0)
            pointers = _pointers(grad_output, reader, from_pixel, output_channel, CHANNELS_LAST)
            mask = reads[:, None] & exists[None, :]
            gradient += tl.load(pointers, mask=mask, other=0).to(tl.float32)
    return gradient


@triton.jit(do_not_specialize=_RUNTIME)
def _backward(
    grad_output, input, weight, starts, readers, mean, rstd, grad_input, sums,
    input_channels, columns, pixels,
    output_batch, output_channel, output_row, output_column,
    input_batch, input_channel, input_row, input_column,
    grad_batch, grad_channel, grad_row, grad_column,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """sums [programs, 2, C], of bias and weight."""
    tiles = tl.cdiv(pixels, BLOCK_PIXELS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    exists = pixel < pixels
    place = sample * pixels + pixel
    average = tl.load(mean + place, mask=exists, other=0)
    scale = tl.load(rstd + place, mask=exists, other=0)
    from_pixel = pixel_offsets(pixel, columns, output_row, output_column, CHANNELS_LAST, ONE_ROW)
    own_pixel = pixel_offsets(pixel, columns, input_row, input_column, CHANNELS_LAST, ONE_ROW)
    grad_output += sample * output_batch
    input += sample * input_batch

    total = tl.zeros([BLOCK_PIXELS], tl.float32)
    along = tl.zeros([BLOCK_PIXELS], tl.float32)
    for first in range(0, input_channels, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS)
        present = channel < input_channels
        gradient = _gradient(
            grad_output, starts, readers, channel, present, exists, from_pixel, output_channel,
            CHANNELS_LAST,
        )  # fmt: skip
        pointers = _pointers(input, channel, own_pixel, input_channel, CHANNELS_LAST)
        mask = present[:, None] & exists[None, :]
        value = tl.load(pointers, mask=mask, other=0).to(tl.float32)
        normalized = (value - average[None, :]) * scale[None, :]
        factor = tl.load(weight + channel, mask=present, other=0).to(tl.float32)
        scaled = gradient * factor[:, None]
        total += tl.sum(scaled, axis=0)
        along += tl.sum(scaled * normalized, axis=0)
        if sums is not None:
            of_program = sums + tl.program_id(0).to(tl.int64) * 2 * input_channels
            tl.store(of_program + channel, tl.sum(gradient, axis=1), mask=present)
            of_weight = tl.sum(gradient * normalized, axis=1)
            tl.store(of_program + input_channels + channel, of_weight, mask=present)

    if grad_input is not None:
        total = total / input_channels
        along = along / input_channels
        to_pixel = pixel_offsets(pixel, columns, grad_row, grad_column, CHANNELS_LAST, ONE_ROW)
        grad_input += sample * grad_batch
        for first in range(0, input_channels, BLOCK_CHANNELS):
            channel = first + tl.arange(0, BLOCK_CHANNELS)
            present = channel < input_channels
            gradient = _gradient(
                grad_output, starts, readers, channel, present, exists, from_pixel,
                output_channel, CHANNELS_LAST,
            )  # fmt: skip
            pointers = _pointers(input, channel, own_pixel, input_channel, CHANNELS_LAST)
            mask = present[:, None] & exists[None, :]
            value = tl.load(pointers, mask=mask, other=0).to(tl.float32)
            normalized = (value - average[None, :]) * scale[None, :]
            factor = tl.load(weight + channel, mask=present, other=0).to(tl.float32)
            scaled = gradient * factor[:, None]
            result = (scaled - total[None, :] - normalized * along[None, :]) * scale[None, :]
            pointers = _pointers(grad_input, channel, to_pixel, grad_channel, CHANNELS_LAST)
            tl.store(pointers, result.to(grad_input.dtype.element_ty), mask=mask)


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    index: Tensor | None,
    eps: float,
    channels_last: bool,
    output: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    batch, channels, rows, columns = output.shape
    block_pixels, block_channels = _block(input, channels_last)
    with torch.cuda.device_of(input):
        _forward[batch * triton.cdiv(rows * columns, block_pixels),](
            *(input, weight, bias, index, output, mean, rstd, eps),
            *(input.shape[1], channels, columns, rows * columns),
            *(*input.stride(), *output.stride()),
            *(block_pixels, block_channels, channels_last),
            is_one_row(channels_last, input, output),
        )


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    index: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    channels_last: bool,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    batch, channels, rows, columns = input.shape
    block_pixels, block_channels = _block(input, channels_last)
    programs = batch * triton.cdiv(rows * columns, block_pixels)
    with torch.cuda.device_of(input):
        starts = readers = sums = None
        if index is not None:
            starts, readers = inverse(index[None], channels)
        if grad_weight is not None or grad_bias is not None:
            sums = mean.new_empty((programs, 2, channels))
        _backward[programs,](
            *(grad_output, input, weight, starts, readers, mean, rstd, grad_input, sums),
            *(channels, columns, rows * columns),
            *(*grad_output.stride(), *input.stride()),
            *((0,) * 4 if grad_input is None else grad_input.stride()),
            *(block_pixels, block_channels, channels_last),
            is_one_row(channels_last, grad_output, input, grad_input),
        )
        if sums is not None:
            for gradient, total in zip((grad_bias, grad_weight), sums.sum(0), strict=True):
                if gradient is not None:
                    gradient.copy_(total)


def _block(input: Tensor, channels_last: bool) -> tuple[int, int]:
    """Pixels of a program, and channels that it works on at a time."""
    channels = triton.next_power_of_2(input.shape[1])
    if channels_last:
        return TILE_PIXELS, min(TILE_CHANNELS, channels)
    return BYTES // input.element_size(), min(CHANNELS, channels)
