"""Attention on a grid with SAM's decomposed relative position."""

from collections.abc import Sequence

from torch import Tensor

from vfmk import _backends
from vfmk.ops import _contract, _implementations, _operator, _rel_pos

NAME = "rel_pos_attention"


def rel_pos_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    grid_size: int | tuple[int, int],
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention over the N = H·W tokens of a grid, biased by relative rows and columns.

    A query at (y, x) and a key at (i, j) score scale·⟨q, k⟩ + ⟨q, R_h[y − i]⟩ + ⟨q, R_w[x − j]⟩.
    Differentiable, once, in all five tensors, in O(N·(H + W)) memory; the tables' gradients are
    computed if asked for, while the bias carries gradient to the query always. Sums are fp32 (fp64
    for float64), and the bits are the same on each run. float64 runs in plain PyTorch, in O(N²)
    memory, and so do, on CUDA, grids too large for offsets of 32 bits (from about 1290 × 1290).

    Args:
        query, key, value: [B, heads, N, d], float32, float16, bfloat16 or float64, d at most 128;
            read in place whatever the strides, if d is dense.
        rel_pos_h, rel_pos_w: [L, d] as SAM stores them: entry size − 1 + (y − i). Tables of a
            length other than 2·size − 1 are interpolated linearly to it, as SAM does.
        grid_size: (H, W), or the side of a square.
        scale: by default 1/√d. The bias is from the unscaled query.

    Returns:
        [B, heads, N, d] in query's dtype, strided so that [B, N, heads·d] is dense.

    Raises:
        TypeError, ValueError: naming the argument.

    Equivalent to::

        q = query.unflatten(2, (H, W))
        bias_h = torch.einsum("bnhwd,hkd->bnhwk", q, get_rel_pos(H, H, rel_pos_h))
        bias_w = torch.einsum("bnhwd,wkd->bnhwk", q, get_rel_pos(W, W, rel_pos_w))
        bias = (bias_h[..., :, None] + bias_w[..., None, :]).flatten(4).flatten(2, 3)
        output = (scale * query @ key.transpose(2, 3) + bias).softmax(-1) @ value

    Source: Segment Anything (2023), `Attention`; MViTv2 (2022), decomposed relative positions.
    """
    grid_size = _contract.int_pair(NAME, "grid_size", grid_size, minimum=1)
    _check_attention(query, key, value, grid_size)
    head_width = query.shape[-1]
    _rel_pos.check_tables(NAME, "query", query, head_width, rel_pos_h, rel_pos_w)
    scale = _rel_pos.checked_scale(NAME, scale, head_width)
    tables = _rel_pos.distance_tables(rel_pos_h, rel_pos_w, grid_size)
    query, key, value, tables = _contract.autocast(  # type: ignore[assignment]
        query, key, value, tables
    )
    grids = (t.unflatten(2, grid_size).permute(0, 2, 3, 1, 4) for t in (query, key, value))
    output, _ = _forward(*grids, tables, grid_size, scale)
    return output.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _check_attention(query: Tensor, key: Tensor, value: Tensor, grid_size: tuple[int, int]) -> None:
    for argument, tensor in {"query": query, "key": key, "value": value}.items():
        _contract.check_tensor(NAME, argument, tensor, "B, heads, N, d")
        if tensor.shape != query.shape:
            raise ValueError(
                f"{NAME}: {argument} is {list(tensor.shape)}, query is {list(query.shape)}"
            )
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{NAME}: {argument} must have a dense last dimension,"
                f" got the strides {tensor.stride()}"
            )
    _contract.check_alike(NAME, query, first="query", key=key, value=value)
    height, width = grid_size
    if height * width != query.shape[2]:
        raise ValueError(
            f"{NAME}: grid_size {height}×{width} has {height * width} places,"
            f" query has {query.shape[2]} tokens"
        )


@_operator.define(NAME)
@_backends.without_autocast
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Tensor,
    window_size: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    output, log_sum_exp = _empty_output(query, key, value, tables, window_size, scale)
    _rel_pos.run_forward(
        NAME, query, key, value, tables, None, None, window_size, scale, output, log_sum_exp
    )
    return output, log_sum_exp


@_forward.register_fake
def _empty_output(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Tensor,
    window_size: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), _rel_pos.new_log_sum_exp(query)


@_operator.define(f"{NAME}_backward")
@_backends.without_autocast
def _backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    window_size: Sequence[int],
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(
        grad_output, query, key, value, tables, output, log_sum_exp, window_size, scale, wanted
    )
    grad_query, grad_key, grad_value, grad_tables = _contract.if_wanted(gradients, wanted)
    _rel_pos.run_backward(
        NAME,
        grad_output,
        (query, key, value),
        tables,
        (None, None),
        (output, log_sum_exp),
        window_size,
        scale,
        (grad_query, grad_key, grad_value),
        grad_tables,
        (None, None),
    )
    return gradients


@_backward.register_fake
def _empty_gradients(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    window_size: Sequence[int],
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_query, grad_key, grad_value, grad_tables = _contract.empty_gradients(
        (query, key, value, tables), wanted
    )
    return grad_query, grad_key, grad_value, grad_tables


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.window_size, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad_output: Tensor, _: Tensor | None):  # type: ignore[no-untyped-def]
    wanted = list(ctx.needs_input_grad[:4])
    gradients = _backward(grad_output, *ctx.saved_tensors, ctx.window_size, ctx.scale, wanted)
    return *_contract.if_wanted(gradients, wanted), None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
_implementations.register(NAME)
