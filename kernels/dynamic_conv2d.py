"""Dense convolution with a kernel set for each sample, in Triton.

    output[b,o,y,x] = bias[b,o] + sum over c,i,j of
        weight[b,o,c,i,j] * input[b, c, y - pad_top + i*dilation_h, x - pad_left + j*dilation_w]

with zeros outside the input. `forward` and `backward` expect checked and allocated arguments: one
dtype throughout; activations with column stride 1 (NCHW), else with channel stride 1
(channels-last); dense weights, outputs and gradients.

Mapping, an implicit matrix product. In `_convolve` a program owns a run of pixels of one sample, in
row-major order, and a block of output channels. Their sums stay in registers as fp32. It walks over
kernel positions and blocks of input channels; each step loads a tile [pixel, input channel] at
shifted addresses, and the tile [input channel, output channel] of that position, and multiplies
them on tensor cores. A pixel is read again for each kernel position, through the L1 and L2 caches;
no unfolded copy exists in memory. grad_input is the same product from grad_output, with offsets
negated and channels exchanged. The weight is first copied to [B, kh*kw, in, out], so that its tiles
are read in whole lines.

In `_weight_gradient` a program owns rows (i, j, c) of one sample's [kh*kw*C, O] gradient and walks
over one of several runs of pixels. Each run leaves an fp32 partial sum, and those are added in a
fixed order: no atomics, the same bits on each run.

Bytes to and from memory, N = H*W pixels of B samples, s bytes an element, K = k*k*C*O: forward
((C + O) N + K) B s. Backward reads grad_output for each of the two gradients and input once:
(2 (C + O) N + 2 K) B s, and 4 K bytes for each partial sum. Forward is 2 K N B FLOP, backward twice
that.

float32 is multiplied as three products of tf32, which keeps fp32's accuracy.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vfmk.kernels._strides import strides_of

__all__ = ["backward", "forward", "not_supported"]

_RUNTIME = [  # sizes and offsets: a new value asks for no new compilation
    *("height", "width", "output_width", "output_pixels", "blocks", "splits"),
    *("top", "left", "step_h", "step_w", "per_sample_weight", "per_sample_bias"),
]


@triton.jit
def _inside(position, size):
    # A negative position wraps to a large one: one comparison instead of two.
    return position.to(tl.uint32) < size.to(tl.uint32)


@triton.jit(do_not_specialize=_RUNTIME)
def _convolve(
    input, weight, bias, output,
    inputs, outputs, height, width, output_width, output_pixels, blocks,
    top, left, step_h, step_w, per_sample_weight, per_sample_bias,
    input_batch, input_channel, input_row, input_column,
    output_batch, output_channel, output_row, output_column,
    KH: tl.constexpr, KW: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_INPUTS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Tap (i, j) of pixel (y, x) reads the input at (y + top + i*step_h, x + left + j*step_w).

    STEPS blocks of input channels make up all of them.
    """
    program = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    o = program % blocks * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    pixel = program // blocks * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    y, x = pixel // output_width, pixel % output_width
    exists = pixel < output_pixels
    input += batch * input_batch
    weight += batch * per_sample_weight * (KH * KW) * inputs * outputs

    sums = tl.zeros([BLOCK_PIXELS, BLOCK_OUTPUTS], tl.float32)
    for step in range(KH * KW * STEPS):
        tap = step // STEPS
        c = step % STEPS * BLOCK_INPUTS + tl.arange(0, BLOCK_INPUTS)
        row, column = y + top + tap // KW * step_h, x + left + tap % KW * step_w
        inside = exists & _inside(row, height) & _inside(column, width)
        offset = row.to(tl.int64) * input_row + column.to(tl.int64) * input_column
        pixels = tl.load(
            input + (offset[:, None] + (c.to(tl.int64) * input_channel)[None, :]),
            mask=inside[:, None] & (c < inputs)[None, :],
            other=0,
        )
        taps = tl.load(
            weight + ((tap * inputs + c)[:, None] * outputs + o[None, :]),
            mask=(c < inputs)[:, None] & (o < outputs)[None, :],
            other=0,
        )
        sums = tl.dot(pixels, taps, sums, input_precision=PRECISION)
    if bias is not None:
        bias += batch * per_sample_bias * outputs
        sums += tl.load(bias + o, mask=o < outputs, other=0).to(tl.float32)[None, :]
    output += batch * output_batch
    offset = y.to(tl.int64) * output_row + x.to(tl.int64) * output_column
    tl.store(
        output + (offset[:, None] + (o.to(tl.int64) * output_channel)[None, :]),
        sums,
        mask=exists[:, None] & (o < outputs)[None, :],
    )


@triton.jit(do_not_specialize=_RUNTIME)
def _weight_gradient(
    grad_output, input, weight_sums,
    inputs, outputs, height, width, output_width, output_pixels, blocks, splits,
    top, left, step_h, step_w,
    grad_batch, grad_channel, grad_row, grad_column,
    input_batch, input_channel, input_row, input_column,
    KH: tl.constexpr, KW: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr,
):  # fmt: skip
    """weight_sums [B, splits, kh*kw*C, O]; a split is STEPS blocks of pixels."""
    program = tl.program_id(0)
    batch, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    rows = KH * KW * inputs
    o = program % blocks * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    row = program // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tap, c = row // inputs, row % inputs
    below, beside = top + tap // KW * step_h, left + tap % KW * step_w  # of the pixel
    input += batch * input_batch
    grad_output += batch * grad_batch

    sums = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
    for step in range(STEPS):
        pixel = (split * STEPS + step) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        y, x = pixel // output_width, pixel % output_width
        exists = pixel < output_pixels
        offset = y.to(tl.int64) * grad_row + x.to(tl.int64) * grad_column
        gradients = tl.load(
            grad_output + (offset[:, None] + (o.to(tl.int64) * grad_channel)[None, :]),
            mask=exists[:, None] & (o < outputs)[None, :],
            other=0,
        )
        input_y, input_x = y[None, :] + below[:, None], x[None, :] + beside[:, None]
        inside = exists[None, :] & _inside(input_y, height) & _inside(input_x, width)
        offset = input_y.to(tl.int64) * input_row + input_x.to(tl.int64) * input_column
        pixels = tl.load(
            input + (offset + (c.to(tl.int64) * input_channel)[:, None]),
            mask=inside & (row < rows)[:, None],
            other=0,
        )
        sums = tl.dot(pixels, gradients, sums, input_precision=PRECISION)
    weight_sums += (batch * splits + split) * rows * outputs
    tl.store(
        weight_sums + (row[:, None] * outputs + o[None, :]),
        sums,
        mask=(row < rows)[:, None] & (o < outputs)[None, :],
    )


class _Tile(NamedTuple):
    """What a program holds at a time; channels and outputs at most."""

    pixels: int
    channels: int
    outputs: int
    stages: int


# [channels_last][bytes of an element]. Nothing spills on any architecture where 16 divides the
# channels, and shared memory fits into 99 KiB;
# tests/kernels/test_ahead_of_time_dynamic_conv2d.py has the counts. In NCHW each element of a tile
# has an address of its own in registers.
_CONVOLVE = {
    False: {2: _Tile(64, 64, 64, 3), 4: _Tile(64, 32, 32, 2)},
    True: {2: _Tile(128, 64, 64, 3), 4: _Tile(64, 32, 64, 2)},
}
_WEIGHT_GRADIENT = {
    False: {2: _Tile(64, 64, 32, 3), 4: _Tile(32, 64, 16, 2)},
    True: {2: _Tile(64, 64, 32, 3), 4: _Tile(32, 64, 32, 2)},
}
_FEW_PIXELS = 64  # a program's, where there would be fewer programs than this many:
_PROGRAMS = 256
_SHORTEST_SPLIT = 512  # pixels, at least
_WARPS = 4
_PRECISION = "tf32x3"  # of products of float32
_SMALLEST = 16  # side of a product on tensor cores


def _block(size: int, most: int) -> int:
    return min(max(triton.next_power_of_2(size), _SMALLEST), most)


def not_supported(input: Tensor, weight: Tensor, padding: Sequence[int]) -> str:
    """Why tensors of these sizes cannot run, or ""."""
    batch, _, height, width = input.shape
    pixels = (height + sum(padding[:2])) * (width + sum(padding[2:]))
    if pixels >= 2**30:
        return f"a plane of {pixels} pixels is too large"
    if math.prod(weight.shape[1:]) >= 2**31:
        return f"a kernel set of {math.prod(weight.shape[1:])} numbers is too large"
    if batch >= 2**16:
        return f"a batch of {batch} is too large for one grid"
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
    packed = weight.flatten(3).permute(0, 3, 2, 1)  # [B, kh*kw, C, O]
    _launch(input, packed, weight.shape[3:], bias, (-padding[0], -padding[2]), dilation, output)


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
    if grad_input is not None:
        packed = weight.flatten(3).permute(0, 3, 1, 2)  # [B, kh*kw, O, C]
        back = (-dilation[0], -dilation[1])
        _launch(
            grad_output, packed, weight.shape[3:], None, (padding[0], padding[2]), back, grad_input
        )
    if grad_weight is not None:
        _launch_weight_gradient(grad_output, input, padding, dilation, grad_weight)
    if grad_bias is not None:
        total = grad_output.sum((2, 3), dtype=torch.float32)
        grad_bias.copy_(total.sum_to_size(grad_bias.shape))


def _launch(
    input: Tensor,
    packed: Tensor,
    kernel_size: Sequence[int],
    bias: Tensor | None,
    origin: Sequence[int],
    steps: Sequence[int],
    output: Tensor,
) -> None:
    """`origin` and `steps`: where the first tap lies, and the next ones from there."""
    if not output.numel():
        return
    batch, inputs, height, width = input.shape
    outputs, output_pixels = output.shape[1], output.shape[2] * output.shape[3]
    tile = _CONVOLVE[input.stride(3) != 1][input.element_size()]
    block_inputs, block_outputs = _block(inputs, tile.channels), _block(outputs, tile.outputs)
    blocks = triton.cdiv(outputs, block_outputs)
    block_pixels = tile.pixels
    if batch * blocks * triton.cdiv(output_pixels, block_pixels) < _PROGRAMS:
        block_pixels = min(block_pixels, _FEW_PIXELS)
    grid = (blocks * triton.cdiv(output_pixels, block_pixels), batch)
    with torch.cuda.device_of(input):
        _convolve[grid](
            *(input, packed.contiguous(), bias, output),
            *(inputs, outputs, height, width, output.shape[3], output_pixels, blocks),
            *(*origin, *steps),
            *(int(packed.shape[0] > 1), int(bias is not None and bias.shape[0] > 1)),
            *strides_of(input, output),
            KH=kernel_size[0],
            KW=kernel_size[1],
            STEPS=triton.cdiv(inputs, block_inputs),
            PRECISION=_PRECISION,
            BLOCK_PIXELS=block_pixels,
            BLOCK_INPUTS=block_inputs,
            BLOCK_OUTPUTS=block_outputs,
            num_warps=_WARPS,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )


def _launch_weight_gradient(
    grad_output: Tensor,
    input: Tensor,
    padding: Sequence[int],
    dilation: Sequence[int],
    grad_weight: Tensor,
) -> None:
    if not grad_output.numel() or not input.numel():
        grad_weight.zero_()
        return
    batch, inputs, height, width = input.shape
    outputs, output_pixels = grad_output.shape[1], grad_output.shape[2] * grad_output.shape[3]
    kh, kw = grad_weight.shape[3:]
    rows = kh * kw * inputs
    tile = _WEIGHT_GRADIENT[input.stride(3) != 1][input.element_size()]
    block_rows, block_outputs = tile.channels, _block(outputs, tile.outputs)
    block_pixels = tile.pixels
    if inputs % _SMALLEST or outputs % _SMALLEST:  # each element has an address of its own, too
        block_pixels = min(block_pixels, _FEW_PIXELS // 2)
    blocks = triton.cdiv(outputs, block_outputs)
    programs = blocks * triton.cdiv(rows, block_rows)
    # Enough splits to fill a GPU, none of them short.
    wanted = triton.cdiv(_PROGRAMS, programs * batch)
    splits = max(1, min(wanted, output_pixels // _SHORTEST_SPLIT))
    steps = triton.next_power_of_2(triton.cdiv(output_pixels, splits * block_pixels))
    splits = triton.cdiv(output_pixels, steps * block_pixels)
    shape = (batch, splits, rows, outputs)
    weight_sums = torch.empty(shape, dtype=torch.float32, device=input.device)
    with torch.cuda.device_of(input):
        _weight_gradient[programs, batch, splits](
            *(grad_output, input, weight_sums),
            *(inputs, outputs, height, width, grad_output.shape[3], output_pixels, blocks, splits),
            *(-padding[0], -padding[2], *dilation),
            *strides_of(grad_output, input),
            KH=kh,
            KW=kw,
            STEPS=steps,
            PRECISION=_PRECISION,
            BLOCK_PIXELS=block_pixels,
            BLOCK_ROWS=block_rows,
            BLOCK_OUTPUTS=block_outputs,
            num_warps=_WARPS,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
    total = weight_sums.sum((0, 1) if grad_weight.shape[0] == 1 else 1)
    total = total.view(*total.shape[:-2], kh, kw, inputs, outputs)
    grad_weight.copy_(total.movedim((-1, -2), (-4, -3)))
