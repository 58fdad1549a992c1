"""Self-attention in an adapter's bottleneck, its projections included, in Triton.

With x the input [N, r] and, of one head of width d, W_q, W_k, W_v [d, r] and b_q, b_k, b_v [d]:

    q_i = W_q x_i + b_q      p_ij = softmax over j of scale * q_i . (W_k x_j + b_k)
    output_i = sum over j of p_ij (W_v x_j + b_v)

q_i . b_k is the same for every j, so it leaves p alone; and the weights p_ij of a query add up to
one. The projections of keys and values therefore move to the query's side:

    p_ij = softmax over j of scale * u_i . x_j,  u_i = W_k^T q_i      (`folded_query`)
    output_i = W_v m_i + b_v,                    m_i = sum over j of p_ij x_j      (`mean`)

and a tile of the input, as it is, serves as keys and as values. It is r wide for each head; r is
small, so a head costs exponentials more than products. The gradient, with t_i = W_v^T dout_i
(`grad_mean`), a_ij = t_i . x_j, ds_ij = p_ij (a_ij - t_i . m_i) and du_i = scale * sum_j ds_ij x_j:

    dq_i = W_k du_i
    dW_q = sum_i dq_i x_i^T    dW_k = sum_i q_i du_i^T    dW_v = sum_i dout_i m_i^T
    db_q = sum_i dq_i          db_k = 0                   db_v = sum_i dout_i
    dx_j = W_q^T dq_j + sum over heads and i of (scale * ds_ij u_i + p_ij t_i)

Mapping. Tokens come in tiles; r and d are padded to powers of two from 16.
`_forward`: a program for each tile of queries, head and batch item. It projects its queries once
and walks over the tiles of the input with the running maximum of the softmax; u, the maximum, the
sum of weights and the weighted sum of tokens stay in registers.
`_backward_queries`: the same programs. p comes from the log-sum-exp, so that one walk gives m and
du. It ends with dq, and with the program's part of the gradients of weight and bias in fp32; those
parts are added by one torch sum. It leaves u, t and two numbers for each query to the next kernel.
`_backward_keys`, only for the input's gradient: a program for each tile of tokens and batch item
walks over the queries of all heads; one sum [tile, r] takes both terms. Nothing of N x N is stored;
no atomics, and the same bits on each run.

Floor, for B batch items and h heads, s bytes an element. Forward: 2BNrs bytes to and from memory
(tiles are re-read through L2, once for each tile of queries), 4BhN^2r FLOP, BhN^2 exponentials.
Backward: 4BNrs bytes, and 2BhNrs of u and t each way; 16BhN^2r FLOP, 2BhN^2 exponentials. On an
H200, with 16 exponentials and 4096 bf16 FLOP a clock on each multiprocessor, exponentials bind
forward up to r = 64, and take as long as the products backward at r = 32.
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
_SIZES = ["tokens", "rows", "heads"]  # nothing recompiles for new ones


@triton.jit
def _load(tensor, first, tokens, stride, WIDTH: tl.constexpr, TILE: tl.constexpr, R: tl.constexpr):
    """Tokens from `first` on, [TILE, R]; zero past `tokens` and past WIDTH."""
    token = first + tl.arange(0, TILE)[:, None]
    channel = tl.arange(0, R)[None, :]
    present = token < tokens
    if WIDTH < R:
        present = present & (channel < WIDTH)
    return tl.load(tensor + (token * stride + channel), mask=present, other=0)


@triton.jit
def _store(tensor, tile, first, tokens, stride, WIDTH: tl.constexpr):
    token = first + tl.arange(0, tile.shape[0])[:, None]
    channel = tl.arange(0, tile.shape[1])[None, :]
    present = (token < tokens) & (channel < WIDTH)
    tl.store(tensor + (token * stride + channel), tile, mask=present)


@triton.jit
def _load_weight(
    qkv_weight, part, head,
    RANK: tl.constexpr, HEAD_WIDTH: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One head's rows of the queries' (0), keys' (1) or values' (2) part, [D, R]."""
    row = part * RANK + head * HEAD_WIDTH
    return _load(qkv_weight + row * RANK, 0, HEAD_WIDTH, RANK, RANK, D, R)


@triton.jit
def _load_bias(qkv_bias, part, head, RANK: tl.constexpr, HEAD_WIDTH: tl.constexpr, D: tl.constexpr):
    """[1, D] in fp32."""
    channel = tl.arange(0, D)[None, :]
    bias = qkv_bias + (part * RANK + head * HEAD_WIDTH)
    return tl.load(bias + channel, mask=channel < HEAD_WIDTH, other=0).to(tl.float32)


@triton.jit
def _project(rows, weight):
    """rows, in fp32, @ weight. In half precision the rows are two numbers each: no rounding."""
    if weight.dtype.primitive_bitwidth == 16:
        high = rows.to(weight.dtype)
        low = (rows - high.to(tl.float32)).to(weight.dtype)
        product = tl.dot(low, weight, tl.dot(high, weight))
    else:
        product = tl.dot(rows, weight, input_precision=_PRECISION)
    return product


@triton.jit
def _project_queries(
    tile, qkv_weight, qkv_bias, head,
    RANK: tl.constexpr, HEAD_WIDTH: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Of a tile of the input, [T, D] in fp32."""
    weight = _load_weight(qkv_weight, 0, head, RANK, HEAD_WIDTH, R, D)
    query = tl.dot(tile, tl.trans(weight), input_precision=_PRECISION)
    return query + _load_bias(qkv_bias, 0, head, RANK, HEAD_WIDTH, D)


@triton.jit
def _fold_queries(
    tile, qkv_weight, qkv_bias, head, scale,
    RANK: tl.constexpr, HEAD_WIDTH: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Of a tile of the input: folded queries, [T, R] in the input's dtype, and the queries'
    products with the keys' bias, [T] in fp32; both scaled, for exponents of two."""
    query = _project_queries(tile, qkv_weight, qkv_bias, head, RANK, HEAD_WIDTH, R, D)
    weight = _load_weight(qkv_weight, 1, head, RANK, HEAD_WIDTH, R, D)
    folded = _project(query, weight) * (scale * _LOG2E)
    from_bias = tl.sum(query * _load_bias(qkv_bias, 1, head, RANK, HEAD_WIDTH, D), 1)
    return folded.to(tile.dtype), from_bias * (scale * _LOG2E)


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    input, qkv_weight, qkv_bias, output, log_sum_exp,
    input_batch, input_token, tokens, heads, scale,
    RANK: tl.constexpr, HEAD_WIDTH: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    OWN: tl.constexpr, WALKED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    first, head, batch = tl.program_id(0) * OWN, tl.program_id(1), tl.program_id(2).to(tl.int64)
    input += batch * input_batch
    own = _load(input, first, tokens, input_token, RANK, OWN, R)
    folded, from_bias = _fold_queries(
        own, qkv_weight, qkv_bias, head, scale, RANK, HEAD_WIDTH, R, D
    )

    # Scores and their maximum are exponents of two.
    maximum = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    sums = tl.zeros([OWN, R], tl.float32)
    tl.assume(tokens > 0)  # a loop that may not run makes ptxas serialise wgmma
    for start in range(0, tokens, WALKED):
        tile = _load(input, start, tokens, input_token, RANK, WALKED, R)
        scores = tl.dot(folded, tl.trans(tile), input_precision=_PRECISION)
        if MASKED:
            exists = (start + tl.arange(0, WALKED) < tokens)[None, :]
            scores = tl.where(exists, scores, float("-inf"))
        previous = maximum
        maximum = tl.maximum(previous, tl.max(scores, 1))
        weights = tl.exp2(scores - maximum[:, None])
        fade = tl.exp2(previous - maximum)
        total = total * fade + tl.sum(weights, 1)
        sums = tl.dot(
            weights.to(tile.dtype), tile, sums * fade[:, None], input_precision=_PRECISION
        )

    weight = _load_weight(qkv_weight, 2, head, RANK, HEAD_WIDTH, R, D)
    attended = _project(sums / total[:, None], tl.trans(weight))
    attended += _load_bias(qkv_bias, 2, head, RANK, HEAD_WIDTH, D)
    output += batch * tokens * RANK + head * HEAD_WIDTH
    _store(output, attended, first, tokens, RANK, HEAD_WIDTH)
    token = first + tl.arange(0, OWN)
    log_sum_exp += (batch * heads + head) * tokens
    exponent = maximum + tl.log2(total) + from_bias
    tl.store(log_sum_exp + token, exponent * _LN2, mask=token < tokens)


@triton.jit(do_not_specialize=_SIZES)
def _backward_queries(
    grad_output, input, qkv_weight, qkv_bias, output, log_sum_exp,
    folded_queries, grad_means, shifts, deltas, grad_query, weight_parts, bias_parts,
    input_batch, input_token, tokens, heads, scale,
    RANK: tl.constexpr, HEAD_WIDTH: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    OWN: tl.constexpr, WALKED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """For `_backward_keys`: folded_queries and grad_means [B, heads, N, R]; shifts and deltas
    [B, heads, N] in fp32, log-sum-exp and t . m as it takes them; grad_query [B, N, RANK]. And
    parts [B, tiles, 3, RANK, RANK] and [B, tiles, 3, RANK] of the weight's and bias's gradients.
    """
    first, head, batch = tl.program_id(0) * OWN, tl.program_id(1), tl.program_id(2).to(tl.int64)
    input += batch * input_batch
    head_offset = batch * tokens * RANK + head * HEAD_WIDTH
    plane = (batch * heads + head) * tokens
    token = first + tl.arange(0, OWN)
    exists = token < tokens

    own = _load(input, first, tokens, input_token, RANK, OWN, R)
    folded, from_bias = _fold_queries(
        own, qkv_weight, qkv_bias, head, scale, RANK, HEAD_WIDTH, R, D
    )
    # Plus infinity: queries that do not exist have no weight.
    shift = tl.load(log_sum_exp + plane + token, mask=exists, other=float("inf"))
    shift = shift * _LOG2E - from_bias
    grad = _load(grad_output + head_offset, first, tokens, RANK, HEAD_WIDTH, OWN, D)
    weight = _load_weight(qkv_weight, 2, head, RANK, HEAD_WIDTH, R, D)
    grad_mean = tl.dot(grad, weight, input_precision=_PRECISION).to(own.dtype)
    attended = _load(output + head_offset, first, tokens, RANK, HEAD_WIDTH, OWN, D).to(tl.float32)
    attended -= _load_bias(qkv_bias, 2, head, RANK, HEAD_WIDTH, D)
    delta = tl.sum(grad.to(tl.float32) * attended, 1)

    mean = tl.zeros([OWN, R], tl.float32)
    sums = tl.zeros([OWN, R], tl.float32)
    excess = tl.zeros([OWN], tl.float32)
    tl.assume(tokens > 0)  # a loop that may not run makes ptxas serialise wgmma
    for start in range(0, tokens, WALKED):
        tile = _load(input, start, tokens, input_token, RANK, WALKED, R)
        scores = tl.dot(folded, tl.trans(tile), input_precision=_PRECISION)
        if MASKED:
            walked = (start + tl.arange(0, WALKED) < tokens)[None, :]
            scores = tl.where(walked, scores, float("-inf"))
        weights = tl.exp2(scores - shift[:, None])
        grad_weights = tl.dot(grad_mean, tl.trans(tile), input_precision=_PRECISION)
        grad_scores = weights * (grad_weights - delta[:, None])
        excess += tl.sum(grad_scores, 1)
        mean = tl.dot(weights.to(tile.dtype), tile, mean, input_precision=_PRECISION)
        sums = tl.dot(grad_scores.to(tile.dtype), tile, sums, input_precision=_PRECISION)

    # The gradients of a query's scores add up to zero; what they add up to instead is what rounding
    # the output and t did to delta, and would count times the mean token.
    grad_folded = (sums - excess[:, None] * mean) * scale
    if grad_query is not None:
        _store(folded_queries + plane * R, folded, first, tokens, R, R)
        _store(grad_means + plane * R, grad_mean, first, tokens, R, R)
        tl.store(shifts + plane + token, shift, mask=exists)
        tl.store(deltas + plane + token, (delta + excess) * _LN2, mask=exists)
    # Tiles are read, and queries projected, once more rather than kept in registers all the way.
    grad = _load(grad_output + head_offset, first, tokens, RANK, HEAD_WIDTH, OWN, D)
    part = (batch * tl.num_programs(0) + tl.program_id(0)) * 3 * RANK + head * HEAD_WIDTH
    if weight_parts is not None:
        weight_parts += part * RANK
        part_sum = tl.dot(tl.trans(grad), mean.to(grad.dtype), input_precision=_PRECISION)
        _store(weight_parts + 2 * RANK * RANK, part_sum, 0, HEAD_WIDTH, RANK, RANK)
        own = _load(input, first, tokens, input_token, RANK, OWN, R)
        query = _project_queries(own, qkv_weight, qkv_bias, head, RANK, HEAD_WIDTH, R, D)
        query = tl.trans(query.to(own.dtype))
        part_sum = tl.dot(query, grad_folded.to(own.dtype), input_precision=_PRECISION)
        _store(weight_parts + RANK * RANK, part_sum, 0, HEAD_WIDTH, RANK, RANK)
    weight = _load_weight(qkv_weight, 1, head, RANK, HEAD_WIDTH, R, D)
    from_query = _project(grad_folded, tl.trans(weight))
    if grad_query is not None:
        _store(grad_query + head_offset, from_query, first, tokens, RANK, HEAD_WIDTH)
    if weight_parts is not None:
        own = _load(input, first, tokens, input_token, RANK, OWN, R)
        part_sum = tl.trans(from_query.to(own.dtype))
        part_sum = tl.dot(part_sum, own, input_precision=_PRECISION)
        _store(weight_parts, part_sum, 0, HEAD_WIDTH, RANK, RANK)
    if bias_parts is not None:
        channel = tl.arange(0, D)
        bias_parts += part + channel
        present = channel < HEAD_WIDTH
        tl.store(bias_parts, tl.sum(from_query, 0), mask=present)
        tl.store(bias_parts + RANK, tl.zeros([D], tl.float32), mask=present)
        tl.store(bias_parts + 2 * RANK, tl.sum(grad.to(tl.float32), 0), mask=present)


@triton.jit(do_not_specialize=_SIZES)
def _backward_keys(
    input, qkv_weight, folded_queries, grad_means, shifts, deltas, grad_query, grad_input,
    input_batch, input_token, tokens, rows,
    RANK: tl.constexpr, R: tl.constexpr,
    OWN: tl.constexpr, WALKED: tl.constexpr,
):  # fmt: skip
    """grad_input. The `rows` = heads * tokens queries of a batch item are walked as one list."""
    first, batch = tl.program_id(0) * OWN, tl.program_id(1).to(tl.int64)
    own = _load(input + batch * input_batch, first, tokens, input_token, RANK, OWN, R)
    if own.dtype.primitive_bitwidth == 16:
        own += 0.0  # untouched, it would be read from shared memory for each product
    folded_queries += batch * rows * R
    grad_means += batch * rows * R
    shifts += batch * rows
    deltas += batch * rows
    sums = tl.zeros([OWN, R], tl.float32)
    tl.assume(rows > 0)  # a loop that may not run makes ptxas serialise wgmma
    for start in range(0, rows, WALKED):
        row = start + tl.arange(0, WALKED)
        exists = row < rows
        folded = _load(folded_queries, start, rows, R, R, WALKED, R)
        grad_mean = _load(grad_means, start, rows, R, R, WALKED, R)
        # Plus infinity: queries that do not exist have no weight.
        shift = tl.load(shifts + row, mask=exists, other=float("inf"))
        delta = tl.load(deltas + row, mask=exists, other=0)
        scores = tl.dot(own, tl.trans(folded), input_precision=_PRECISION)
        weights = tl.exp2(scores - shift[None, :])
        grad_weights = tl.dot(own, tl.trans(grad_mean), input_precision=_PRECISION)
        # times ln 2, since `folded` is an exponent of two
        grad_scores = weights * (grad_weights * _LN2 - delta[None, :])
        sums = tl.dot(weights.to(own.dtype), grad_mean, sums, input_precision=_PRECISION)
        sums = tl.dot(grad_scores.to(own.dtype), folded, sums, input_precision=_PRECISION)

    through_query = _load(grad_query + batch * tokens * RANK, first, tokens, RANK, RANK, OWN, R)
    weight = _load_weight(qkv_weight, 0, 0, RANK, RANK, R, R)
    sums = tl.dot(through_query, weight, sums, input_precision=_PRECISION)
    _store(grad_input + batch * tokens * RANK, sums, first, tokens, RANK, RANK)


class _Tile(NamedTuple):
    """What a program holds at a time."""

    own: int  # tokens of the tile it is there for
    walked: int  # tokens of a tile of its loop
    warps: int
    stages: int


# By kernel, then by padded rank: the first that is as wide. Nothing spills on any architecture
# (tests/kernels/test_ahead_of_time_adapter_attention.py).
_HALF = {
    "forward": {32: _Tile(128, 64, 8, 3), 64: _Tile(64, 64, 4, 3)},
    "backward_queries": {32: _Tile(64, 32, 4, 3), 64: _Tile(32, 32, 4, 2)},
    "backward_keys": {32: _Tile(128, 32, 8, 3), 64: _Tile(128, 32, 8, 2)},
}
_FLOAT32 = {
    "forward": {32: _Tile(32, 32, 4, 2), 64: _Tile(32, 16, 8, 2)},
    "backward_queries": {32: _Tile(32, 16, 8, 2), 64: _Tile(16, 16, 8, 2)},
    "backward_keys": {32: _Tile(64, 16, 8, 2), 64: _Tile(32, 32, 8, 2)},
}
# The widest tiles are halved, with their warps, where they would leave multiprocessors idle.
_WIDEST, _ENOUGH_PROGRAMS = 128, 256

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HIGHEST_RANK = 64


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _tile(kernel: str, input: Tensor, planes: int) -> _Tile:
    tiles = (_FLOAT32 if input.dtype == torch.float32 else _HALF)[kernel]
    tile = next(tiles[rank] for rank in tiles if input.shape[2] <= rank)
    programs = planes * triton.cdiv(input.shape[1], tile.own)
    if tile.own == _WIDEST and programs < _ENOUGH_PROGRAMS:
        tile = tile._replace(own=tile.own // 2, warps=tile.warps // 2)
    return tile


def not_supported(input: Tensor, num_heads: int) -> str:
    """Why input [B, N, r] cannot run here, or ""."""
    batch, tokens, rank = input.shape
    if input.dtype not in _DTYPES:
        return f"dtype is {input.dtype}, not float32, float16 or bfloat16"
    if rank > _HIGHEST_RANK:
        return f"rank {rank} is above {_HIGHEST_RANK}"
    if max(batch, num_heads) >= 2**16:
        return f"a batch of {batch} with {num_heads} heads is too large for one grid"
    # Offsets within a batch item have 32 bits.
    if tokens * max(strides_of(input, dimensions=2)[1], num_heads * _padded(rank)) >= 2**31:
        return f"{tokens} tokens, {strides_of(input, dimensions=2)[1]} elements apart, are too many"
    return ""


def forward(
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    num_heads: int,
    scale: float,
    output: Tensor,
    log_sum_exp: Tensor,
) -> None:
    """Write output [B, N, r] and log_sum_exp [B, heads, N], natural and in fp32.

    All are dense but the input, whose last dimension is. None is empty.
    """
    batch, tokens, rank = input.shape
    tile = _tile("forward", input, batch * num_heads)
    with torch.cuda.device_of(input):
        _forward[triton.cdiv(tokens, tile.own), num_heads, batch](
            *(input, qkv_weight, qkv_bias, output, log_sum_exp),
            *(*strides_of(input, dimensions=2), tokens, num_heads, scale),
            HEAD_WIDTH=rank // num_heads,
            D=_padded(rank // num_heads),
            MASKED=tokens % tile.walked != 0,
            **_options(input, tile),
        )


def backward(
    grad_output: Tensor,
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    num_heads: int,
    scale: float,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Write those of grad_input, grad_weight and grad_bias that are not None."""
    if grad_input is grad_weight is grad_bias is None:
        return
    batch, tokens, rank = input.shape
    tile = _tile("backward_queries", input, batch * num_heads)
    tiles = triton.cdiv(tokens, tile.own)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=input.device)

    folded_queries = grad_means = shifts = deltas = grad_query = None
    if grad_input is not None:
        planes = (batch, num_heads, tokens)
        folded_queries = scratch(*planes, _padded(rank), dtype=input.dtype)
        grad_means = torch.empty_like(folded_queries)
        shifts, deltas = scratch(*planes), scratch(*planes)
        grad_query = scratch(batch, tokens, rank, dtype=input.dtype)
    weight_parts = None if grad_weight is None else scratch(batch * tiles, 3 * rank, rank)
    bias_parts = None if grad_bias is None else scratch(batch * tiles, 3 * rank)
    with torch.cuda.device_of(input):
        _backward_queries[tiles, num_heads, batch](
            *(grad_output, input, qkv_weight, qkv_bias, output, log_sum_exp),
            *(folded_queries, grad_means, shifts, deltas, grad_query, weight_parts, bias_parts),
            *(*strides_of(input, dimensions=2), tokens, num_heads, scale),
            HEAD_WIDTH=rank // num_heads,
            D=_padded(rank // num_heads),
            MASKED=tokens % tile.walked != 0,
            **_options(input, tile),
        )
        for grad, parts in ((grad_weight, weight_parts), (grad_bias, bias_parts)):
            if grad is not None and parts is not None:
                grad.copy_(parts.sum(0))
        if grad_input is not None:
            tile = _tile("backward_keys", input, batch)
            _backward_keys[triton.cdiv(tokens, tile.own), batch](
                *(input, qkv_weight, folded_queries, grad_means, shifts, deltas),
                *(grad_query, grad_input),
                *(*strides_of(input, dimensions=2), tokens, num_heads * tokens),
                **_options(input, tile),
            )


def _options(input: Tensor, tile: _Tile) -> dict[str, int | bool]:
    """Compile-time arguments that every kernel takes."""
    return {
        "RANK": input.shape[2],
        "R": _padded(input.shape[2]),
        "OWN": tile.own,
        "WALKED": tile.walked,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }
