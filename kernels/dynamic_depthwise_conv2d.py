"""Depthwise convolution with a kernel set for each sample, in Triton.

    output[b,c,y,x] = bias[b,c] + sum over i,j of
        weight[b,c,i,j] * input[b, c, y - pad_top + i*dilation_h, x - pad_left + j*dilation_w]

with zeros outside the input. `forward` and `backward` expect checked and allocated arguments: one
dtype throughout; activations with column stride 1 (NCHW), else with channel stride 1
(channels-last); dense weights, outputs and gradients.

Bytes to and from memory, N = B*C*H*W elements of s bytes: forward 2Ns + BCkhkws, backward
3Ns + 2BCkhkws. Where programs share a sum of grad_weight (large planes, channels-last, a kernel
set shared by the batch), each writes an fp32 partial sum, and those are added in a fixed order: no
atomics, the same bits on each run.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vfmk.kernels._depthwise_strips import backward_strips, forward_strips
from vfmk.kernels._depthwise_tiles import backward_tiles, forward_tiles
from vfmk.kernels._strides import strides_of

__all__ = ["backward", "forward", "not_supported"]


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


class _Cut(NamedTuple):
    """An activation [B, C, H, W] cut into programs."""

    programs: int
    tiles: int  # of them for one plane, or for its block of channels
    steps: int  # down a strip
    vector: int  # the unit of the strides
    options: dict[str, int | bool]  # compile-time arguments of the kernel


def _ceil(size: int, block: int) -> int:
    return -(-size // block)


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
    strides = strides_of(input, output)
    sizes = (channels, height, width, output_height, output_width, padding[0], padding[2])
    per_sample = (int(weight.shape[0] > 1), int(bias is not None and bias.shape[0] > 1))
    with torch.cuda.device_of(input):
        if _fits_strips(kernel_size, dilation):
            same = _is_same(kernel_size, padding)
            cut = _cut_strips(
                *(False, channels_last, same, kernel_size),
                *(tuple(output.shape), strides, input.element_size()),
            )
            forward_strips[cut.programs,](
                *(input, _channels_innermost(weight) if channels_last else weight, bias, output),
                *(*sizes, cut.tiles, cut.steps),
                *(stride // cut.vector for stride in strides),
                *per_sample,
                **cut.options,
            )
        else:
            pixels = output_height * output_width
            cut = _cut_tiles(channels_last, kernel_size, batch, channels, pixels)
            forward_tiles[cut.programs,](
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
    strides = strides_of(*activations)
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
            backward_strips[cut.programs,](
                *(*tensors, *sizes, cut.tiles, cut.steps),
                *(stride // cut.vector for stride in strides),
                per_sample,
                **cut.options,
            )
        else:
            backward_tiles[cut.programs,](
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
