"""Attention pooling in Triton: softmax over the tokens, times the tokens.

    p_mj = softmax over j of scale * queries_m . tokens_j    output_m = sum over j of p_mj tokens_j

The gradient, with a_mj = dout_m . tokens_j and ds_mj = p_mj (a_mj - dout_m . output_m):

    dtokens_j = sum over m of (scale * ds_mj queries_m + p_mj dout_m)
    dqueries_m = scale * sum over batch and j of ds_mj tokens_j

Mapping. M and D are padded to powers of two from 16. A program holds all queries and walks over a
part of one batch item's tokens, a tile at a time; a batch item has as many parts as keep the
multiprocessors busy, one where the batch does that.
`_forward`: the running maximum of the softmax, the sum of weights and the weighted sum of tokens
stay in registers; a program leaves the mean token of its part and its log-sum-exp, [M, D] and [M].
`_combine`, where there are several parts: a program for each query and batch item weights the
parts' means, held in fp32, by their log-sum-exp.
`_backward`: p comes from the log-sum-exp. A tile is read once for its own gradient, which needs no
other program, and for that of the queries, whose sum [M, D] stays in registers. Each program leaves
that sum in fp32, and one torch sum adds them up: no atomics, the same bits on each run.

Floor, s bytes an element: memory binds. Forward: BNDs bytes, 4BNMD FLOP, BNM exponentials.
Backward: 2BNDs bytes, 10BNMD FLOP, BNM exponentials. The parts, 4MD bytes each way for each of at
most 64 of a batch item, stay in L2.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vfmk.kernels._strides import strides_of

__all__ = ["backward", "forward", "not_supported"]

_LOG2E = tl.constexpr(1 / math.log(2))
_LN2 = tl.constexpr(math.log(2))
_PRECISION = tl.constexpr("ieee")  # of products of float32
_SIZES = ["count", "length", "queries_count", "parts"]  # nothing recompiles for new ones


@triton.jit
def _load(tensor, first, count, stride, WIDTH: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr):
    """Rows from `first` on, [TILE, D]; zero past `count` and past WIDTH."""
    row = first + tl.arange(0, TILE)[:, None]
    channel = tl.arange(0, D)[None, :]
    present = row < count
    if WIDTH < D:
        present = present & (channel < WIDTH)
    return tl.load(tensor + (row * stride + channel), mask=present, other=0)


@triton.jit
def _store(tensor, tile, first, count, WIDTH: tl.constexpr):
    row = first + tl.arange(0, tile.shape[0])[:, None]
    channel = tl.arange(0, tile.shape[1])[None, :]
    tl.store(tensor + (row * WIDTH + channel), tile, mask=(row < count) & (channel < WIDTH))


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    tokens, queries, means, log_sum_exp,
    tokens_batch, tokens_token, count, length, queries_count, scale,
    WIDTH: tl.constexpr, M: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """means [B, parts, M, WIDTH] and log_sum_exp [B, parts, M] of parts of `length` tokens."""
    first, batch = tl.program_id(0) * length, tl.program_id(1).to(tl.int64)
    tokens += batch * tokens_batch
    end = tl.minimum(first + length, count)
    query = _load(queries, 0, queries_count, WIDTH, WIDTH, M, D)

    # Scores and their maximum are exponents of two.
    maximum = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, D], tl.float32)
    for start in range(first, end, TILE):
        tile = _load(tokens, start, end, tokens_token, WIDTH, TILE, D)
        scores = tl.dot(query, tl.trans(tile), input_precision=_PRECISION) * (scale * _LOG2E)
        exists = (start + tl.arange(0, TILE) < end)[None, :]
        scores = tl.where(exists, scores, float("-inf"))
        previous = maximum
        maximum = tl.maximum(previous, tl.max(scores, 1))
        weights = tl.exp2(scores - maximum[:, None])
        fade = tl.exp2(previous - maximum)
        total = total * fade + tl.sum(weights, 1)
        sums = tl.dot(
            weights.to(tile.dtype), tile, sums * fade[:, None], input_precision=_PRECISION
        )

    part = (batch * tl.num_programs(0) + tl.program_id(0)) * queries_count
    _store(means + part * WIDTH, sums / total[:, None], 0, queries_count, WIDTH)
    index = tl.arange(0, M)
    exponent = maximum + tl.log2(total)
    tl.store(log_sum_exp + part + index, exponent * _LN2, mask=index < queries_count)


@triton.jit(do_not_specialize=_SIZES)
def _combine(
    part_means, part_log_sum_exp, output, log_sum_exp, queries_count, parts,
    WIDTH: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    query, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    part = tl.arange(0, PARTS)
    row = (batch * parts + part) * queries_count + query
    exponent = tl.load(part_log_sum_exp + row, mask=part < parts, other=float("-inf")) * _LOG2E
    maximum = tl.max(exponent, 0)
    weights = tl.exp2(exponent - maximum)
    total = tl.sum(weights, 0)
    channel = tl.arange(0, D)
    present = (part < parts)[:, None] & (channel < WIDTH)[None, :]
    means = tl.load(part_means + (row[:, None] * WIDTH + channel[None, :]), mask=present, other=0)
    mean = tl.sum(weights[:, None] * means, 0) / total
    row = batch * queries_count + query
    tl.store(output + row * WIDTH + channel, mean, mask=channel < WIDTH)
    tl.store(log_sum_exp + row, (maximum + tl.log2(total)) * _LN2)


@triton.jit(do_not_specialize=_SIZES)
def _backward(
    grad_output, tokens, queries, output, log_sum_exp, grad_tokens, query_sums,
    tokens_batch, tokens_token, count, length, queries_count, scale,
    WIDTH: tl.constexpr, M: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """grad_tokens, and query_sums [B, parts, M, WIDTH] of parts of `length` tokens."""
    first, batch = tl.program_id(0) * length, tl.program_id(1).to(tl.int64)
    tokens += batch * tokens_batch
    end = tl.minimum(first + length, count)
    query = _load(queries, 0, queries_count, WIDTH, WIDTH, M, D)
    of_batch = batch * queries_count
    grad = _load(grad_output + of_batch * WIDTH, 0, queries_count, WIDTH, WIDTH, M, D)
    mean = _load(output + of_batch * WIDTH, 0, queries_count, WIDTH, WIDTH, M, D)
    delta = tl.sum(grad.to(tl.float32) * mean.to(tl.float32), 1)
    index = tl.arange(0, M)
    # Plus infinity: queries that do not exist have no weight.
    shift = tl.load(log_sum_exp + of_batch + index, mask=index < queries_count, other=float("inf"))
    shift *= _LOG2E

    sums = tl.zeros([M, D], tl.float32)
    for start in range(first, end, TILE):
        tile = _load(tokens, start, end, tokens_token, WIDTH, TILE, D)
        scores = tl.dot(tile, tl.trans(query), input_precision=_PRECISION) * (scale * _LOG2E)
        exists = (start + tl.arange(0, TILE) < end)[:, None]
        scores = tl.where(exists, scores, float("-inf"))
        weights = tl.exp2(scores - shift[None, :])
        grad_weights = tl.dot(tile, tl.trans(grad), input_precision=_PRECISION)
        grad_scores = (weights * (grad_weights - delta[None, :]) * scale).to(tile.dtype)
        if grad_tokens is not None:
            grad_tile = tl.dot(grad_scores, query, input_precision=_PRECISION)
            grad_tile = tl.dot(weights.to(tile.dtype), grad, grad_tile, input_precision=_PRECISION)
            _store(grad_tokens + batch * count * WIDTH, grad_tile, start, end, WIDTH)
        if query_sums is not None:
            sums = tl.dot(tl.trans(grad_scores), tile, sums, input_precision=_PRECISION)
    if query_sums is not None:
        part = (batch * tl.num_programs(0) + tl.program_id(0)) * queries_count
        _store(query_sums + part * WIDTH, sums, 0, queries_count, WIDTH)


class _Tile(NamedTuple):
    """What a program holds at a time."""

    tokens: int
    warps: int
    stages: int


# Nothing spills on any architecture (tests/kernels/test_ahead_of_time_attention_pool.py).
_HALF = _Tile(64, 4, 3)
_FLOAT32 = _Tile(16, 8, 2)
_ENOUGH_PROGRAMS = 256  # for any GPU so far to be busy
_MOST_PARTS = 64  # of a batch item, that one program combines

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_QUERIES, _WIDEST_TOKEN = 64, 64


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


class _Cut(NamedTuple):
    """Each batch item's tokens cut into parts, a program for each."""

    parts: int
    length: int  # of a part, in tokens
    options: dict[str, int | bool]  # compile-time arguments of the kernel


def _cut(tokens: Tensor, queries: Tensor) -> _Cut:
    batch, count, width = tokens.shape
    padded = _padded(queries.shape[0]), _padded(width)
    tile = _FLOAT32 if tokens.dtype == torch.float32 else _HALF
    tiles = triton.cdiv(count, tile.tokens)
    parts = min(tiles, _MOST_PARTS, triton.cdiv(_ENOUGH_PROGRAMS, batch))
    length = triton.cdiv(tiles, parts) * tile.tokens
    options = {
        "WIDTH": width,
        "M": padded[0],
        "D": padded[1],
        "TILE": tile.tokens,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }
    return _Cut(triton.cdiv(count, length), length, options)


def not_supported(tokens: Tensor, queries: Tensor) -> str:
    """Why tokens [B, N, D] and queries [M, D] cannot run here, or ""."""
    batch, count, width = tokens.shape
    if tokens.dtype not in _DTYPES:
        return f"dtype is {tokens.dtype}, not float32, float16 or bfloat16"
    if queries.shape[0] > _MOST_QUERIES:
        return f"{queries.shape[0]} queries are more than {_MOST_QUERIES}"
    if width > _WIDEST_TOKEN:
        return f"token width {width} is above {_WIDEST_TOKEN}"
    if batch >= 2**16:
        return f"a batch of {batch} is too large for one grid"
    # Offsets within a batch item have 32 bits.
    if count * max(strides_of(tokens, dimensions=2)[1], width) >= 2**31:
        return f"{count} tokens, {strides_of(tokens, dimensions=2)[1]} elements apart, are too many"
    return ""


def forward(
    tokens: Tensor, queries: Tensor, scale: float, output: Tensor, log_sum_exp: Tensor
) -> None:
    """Write output [B, M, D] and log_sum_exp [B, M], natural and in fp32.

    All are dense but the tokens, whose last dimension is. None is empty.
    """
    batch, count, width = tokens.shape
    queries_count = queries.shape[0]
    cut = _cut(tokens, queries)
    means, exponents = output, log_sum_exp
    if cut.parts > 1:
        shape = (batch, cut.parts, queries_count)
        means = torch.empty((*shape, width), dtype=torch.float32, device=tokens.device)
        exponents = torch.empty(shape, dtype=torch.float32, device=tokens.device)
    with torch.cuda.device_of(tokens):
        _forward[cut.parts, batch](
            *(tokens, queries, means, exponents),
            *(*strides_of(tokens, dimensions=2), count, cut.length, queries_count, scale),
            **cut.options,
        )
        if cut.parts > 1:
            _combine[queries_count, batch](
                *(means, exponents, output, log_sum_exp, queries_count, cut.parts),
                WIDTH=width,
                D=_padded(width),
                PARTS=triton.next_power_of_2(cut.parts),
                num_warps=4,
                enable_fp_fusion=True,
            )


def backward(
    grad_output: Tensor,
    tokens: Tensor,
    queries: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    grad_tokens: Tensor | None,
    grad_queries: Tensor | None,
) -> None:
    """Write those of grad_tokens and grad_queries that are not None."""
    if grad_tokens is grad_queries is None:
        return
    batch, count, width = tokens.shape
    queries_count = queries.shape[0]
    cut = _cut(tokens, queries)
    query_sums = None
    if grad_queries is not None:
        shape = (batch * cut.parts, queries_count, width)
        query_sums = torch.empty(shape, dtype=torch.float32, device=tokens.device)
    with torch.cuda.device_of(tokens):
        _backward[cut.parts, batch](
            *(grad_output, tokens, queries, output, log_sum_exp, grad_tokens, query_sums),
            *(*strides_of(tokens, dimensions=2), count, cut.length, queries_count, scale),
            **cut.options,
        )
        if grad_queries is not None and query_sums is not None:
            grad_queries.copy_(query_sums.sum(0))
