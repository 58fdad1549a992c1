"""SAM's windowed attention straight out of the qkv tensor, on the unpadded grid."""

from collections.abc import Sequence

from torch import Tensor

from vfmk import _backends
from vfmk.ops import _contract, _implementations, _operator, _rel_pos

NAME = "window_rel_pos_attention"


def window_rel_pos_attention(
    qkv: Tensor,
    qkv_bias: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    window_size: int | tuple[int, int],
    num_heads: int,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention with relative position inside windows, without cutting, padding or merging them.

    Windows start at the grid's first token. Where the last ones reach beyond the grid, SAM pads
    with zeros after LayerNorm and masks nothing, so the keys and values there are those of
    `qkv_bias`; they are put in by the kernel. A window as large as the grid is global attention.
    Differentiable, once, in qkv, qkv_bias (what flows through the padding) and the tables. float64
    runs in plain PyTorch, with the scores of all windows in memory.

    Args:
        qkv: [B, H, W, 3·heads·d], dense in the last dimension: queries, keys, values, each with its
            heads one after the other, as `Attention.qkv` gives them, the bias included.
        qkv_bias: [3·heads·d], that bias.
        rel_pos_h, rel_pos_w: [L, d], see `rel_pos_attention`.
        window_size: side of the windows, or (rows, columns).
        num_heads: heads.
        scale: by default 1/√d.

    Returns:
        [B, H, W, heads·d], dense, in qkv's dtype.

    Raises:
        TypeError, ValueError: naming the argument.

    Equivalent to segment_anything's::

        windows, padded = window_partition(x, window_size)
        output = window_unpartition(attention(windows), window_size, padded, (H, W))

    for an `attention` without its output projection, and x before its qkv projection.

    Source: Segment Anything (2023), `Block`.
    """
    _contract.check_tensor(NAME, "qkv", qkv, "B, H, W, 3·heads·d")
    _contract.check_tensor(NAME, "qkv_bias", qkv_bias, "3·heads·d")
    _contract.check_alike(NAME, qkv, first="qkv", qkv_bias=qkv_bias)
    _contract.check_int(NAME, "num_heads", num_heads)
    channels = qkv.shape[-1]
    if num_heads < 1 or channels % (3 * num_heads) or not channels:
        raise ValueError(
            f"{NAME}: qkv has {channels} channels, which 3·{num_heads} does not divide"
        )
    if qkv_bias.shape[0] != channels:
        raise ValueError(f"{NAME}: qkv_bias has {qkv_bias.shape[0]} channels, qkv has {channels}")
    if qkv.stride(-1) != 1:
        raise ValueError(
            f"{NAME}: qkv must have a dense last dimension, got the strides {qkv.stride()}"
        )
    window = _contract.int_pair(NAME, "window_size", window_size, minimum=1)
    head_width = channels // (3 * num_heads)
    _rel_pos.check_tables(NAME, "qkv", qkv, head_width, rel_pos_h, rel_pos_w)
    scale = _rel_pos.checked_scale(NAME, scale, head_width)
    tables = _rel_pos.distance_tables(rel_pos_h, rel_pos_w, window)
    qkv, qkv_bias, tables = _contract.autocast(qkv, qkv_bias, tables)  # type: ignore[assignment]
    packed = qkv.unflatten(3, (3, num_heads, head_width))
    padding = qkv_bias.unflatten(0, (3, num_heads, head_width))
    output, _ = _forward(packed, padding, tables, window, scale)
    return output.flatten(3)


@_operator.define(NAME)
@_backends.without_autocast
def _forward(
    qkv: Tensor, padding: Tensor, tables: Tensor, window_size: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    output, log_sum_exp = _empty_output(qkv, padding, tables, window_size, scale)
    pads = _pads(qkv, padding, window_size)
    query, key, value = qkv.unbind(3)
    _rel_pos.run_forward(
        NAME, query, key, value, tables, *pads, window_size, scale, output, log_sum_exp
    )
    return output, log_sum_exp


@_forward.register_fake
def _empty_output(
    qkv: Tensor, padding: Tensor, tables: Tensor, window_size: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    query = qkv[:, :, :, 0]
    return query.new_empty(query.shape), _rel_pos.new_log_sum_exp(query)


@_operator.define(f"{NAME}_backward")
@_backends.without_autocast
def _backward(
    grad_output: Tensor,
    qkv: Tensor,
    padding: Tensor,
    tables: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    window_size: Sequence[int],
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(
        grad_output, qkv, padding, tables, output, log_sum_exp, window_size, scale, wanted
    )
    grad_qkv, grad_padding, grad_tables = gradients
    query, key, value = qkv.unbind(3)
    grad_query, grad_key, grad_value = grad_qkv.unbind(3) if wanted[0] else (None, None, None)
    pads = _pads(qkv, padding, window_size)
    grad_pads: tuple[Tensor | None, Tensor | None] = (None, None)
    if wanted[1]:
        grad_padding.zero_()  # the padding's queries do not exist
        if pads[0] is not None:
            grad_pads = (grad_padding[1], grad_padding[2])
    _rel_pos.run_backward(
        NAME,
        grad_output,
        (query, key, value),
        tables,
        pads,
        (output, log_sum_exp),
        window_size,
        scale,
        (grad_query, grad_key, grad_value),
        grad_tables if wanted[2] else None,
        grad_pads,
    )
    return gradients


@_backward.register_fake
def _empty_gradients(
    grad_output: Tensor,
    qkv: Tensor,
    padding: Tensor,
    tables: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    window_size: Sequence[int],
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    grad_qkv, grad_padding, grad_tables = _contract.empty_gradients((qkv, padding, tables), wanted)
    return grad_qkv, grad_padding, grad_tables


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.window_size, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad_output: Tensor, _: Tensor | None):  # type: ignore[no-untyped-def]
    wanted = list(ctx.needs_input_grad[:3])
    gradients = _backward(grad_output, *ctx.saved_tensors, ctx.window_size, ctx.scale, wanted)
    return *_contract.if_wanted(gradients, wanted), None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _pads(
    qkv: Tensor, padding: Tensor, window_size: Sequence[int]
) -> tuple[Tensor | None, Tensor | None]:
    """Key and value beyond the grid, where windows reach there."""
    rows, columns = window_size
    if qkv.shape[1] % rows == 0 and qkv.shape[2] % columns == 0:
        return None, None
    _, pad_key, pad_value = padding.contiguous()
    return pad_key, pad_value


_implementations.register(NAME, module="rel_pos_attention")  # the same kernels
