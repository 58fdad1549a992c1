"""Attention on a grid with SAM's decomposed relative position, and the same inside windows."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from vfmk import _backends
from vfmk.ops import _contract
from vfmk.reference.rel_pos_attention import resized_tables

NAME = "rel_pos_attention"
MAX_HEAD_WIDTH = 128


def rel_pos_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    grid_size: tuple[int, int],
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention over the N = H·W tokens of a grid, biased by relative rows and columns.

    A query at (y, x) and a key at (i, j) score scale·⟨q, k⟩ + ⟨q, R_h[y − i]⟩ + ⟨q, R_w[x − j]⟩.
    Differentiable in all five tensors, in O(N·(H + W)) memory; the tables' gradients are computed
    if asked for, while the bias carries gradient to the query always. Sums are fp32 (fp64 for
    float64), and the bits are the same on each run.

    Args:
        query, key, value: [B, heads, N, d], float32, float16, bfloat16 or float64, d at most 128;
            read in place whatever the strides, if d is dense.
        rel_pos_h, rel_pos_w: [L, d] as SAM stores them: entry size − 1 + (y − i). Tables of a
            length other than 2·size − 1 are interpolated linearly to it, as SAM does.
        grid_size: (H, W).
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
    _check_attention(query, key, value, grid_size)
    _check_tables(NAME, "query", query, query.shape[-1], rel_pos_h, rel_pos_w)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    query, key, value, rel_pos_h, rel_pos_w = _contract.autocast(  # type: ignore[assignment]
        query, key, value, rel_pos_h, rel_pos_w
    )
    grids = (t.unflatten(2, grid_size).permute(0, 2, 3, 1, 4) for t in (query, key, value))
    tables = distance_tables(rel_pos_h, rel_pos_w, grid_size)
    output, _ = torch.ops.vfmk.rel_pos_attention(*grids, tables, grid_size, scale)
    return output.permute(0, 3, 1, 2, 4).flatten(2, 3)


def distance_tables(rel_pos_h: Tensor, rel_pos_w: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Both tables as one [R, d], R = 2·rows − 1 + 2·columns − 1, each turned so that the entry for
    the key farthest above (left) comes first. Differentiable."""
    tables = resized_tables(rel_pos_h, rel_pos_w, window_size)
    return torch.cat([table.flip(0) for table in tables])


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
    height, width = _contract.int_pair(NAME, "grid_size", grid_size, minimum=1)
    if height * width != query.shape[2]:
        raise ValueError(
            f"{NAME}: grid_size {height}×{width} has {height * width} places,"
            f" query has {query.shape[2]} tokens"
        )


def _check_tables(
    operator: str, first: str, input: Tensor, head_width: int, rel_pos_h: Tensor, rel_pos_w: Tensor
) -> None:
    if not 1 <= head_width <= MAX_HEAD_WIDTH:
        raise ValueError(
            f"{operator}: {first} has heads of width {head_width}, expected 1 to {MAX_HEAD_WIDTH}"
        )
    for argument, table in {"rel_pos_h": rel_pos_h, "rel_pos_w": rel_pos_w}.items():
        _contract.check_tensor(operator, argument, table, "L, d")
        if table.shape[1] != head_width or table.shape[0] < 1:
            raise ValueError(
                f"{operator}: {argument} must be [L, {head_width}], got {list(table.shape)}"
            )
    _contract.check_alike(operator, input, first=first, rel_pos_h=rel_pos_h, rel_pos_w=rel_pos_w)


@torch.library.custom_op(f"vfmk::{NAME}", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Tensor,
    window_size: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    output, logsumexp = _empty_output(query, key, value, tables, window_size, scale)
    run_forward(NAME, query, key, value, tables, None, None, window_size, scale, output, logsumexp)
    return output, logsumexp


@_forward.register_fake
def _empty_output(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Tensor,
    window_size: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), new_logsumexp(query)


@torch.library.custom_op(f"vfmk::{NAME}_backward", mutates_args=())
def _backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    window_size: Sequence[int],
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(
        grad_output, query, key, value, tables, output, logsumexp, window_size, scale, wanted
    )
    grad_query, grad_key, grad_value, grad_tables = (
        gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)
    )
    run_backward(
        NAME,
        grad_output,
        (query, key, value),
        tables,
        (None, None),
        (output, logsumexp),
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
    logsumexp: Tensor,
    window_size: Sequence[int],
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A dense tensor for each gradient, empty ([0]) for those that nobody wants."""
    grad_query, grad_key, grad_value, grad_tables = (
        tensor.new_empty(tensor.shape if want else 0)
        for tensor, want in zip((query, key, value, tables), wanted, strict=True)
    )
    return grad_query, grad_key, grad_value, grad_tables


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.window_size, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, grad_output: Tensor, _: Tensor | None):  # type: ignore[no-untyped-def]
    wanted = list(ctx.needs_input_grad[:4])
    gradients = torch.ops.vfmk.rel_pos_attention_backward(
        grad_output, *ctx.saved_tensors, ctx.window_size, ctx.scale, wanted
    )
    return (
        *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)),
        None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)


def new_logsumexp(query: Tensor) -> Tensor:
    """For each query [B, H, W, heads, d] one value, in the dtype of the sums: [B, heads, H, W]."""
    batch, height, width, heads, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((batch, heads, height, width), dtype=dtype)


def run_forward(
    operator: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    window_size: Sequence[int],
    scale: float,
    output: Tensor,
    logsumexp: Tensor,
) -> None:
    """Run the kernel on [B, H, W, heads, d] tensors; the query's products with the tables are one
    matrix product, which backward does again rather than keep."""
    relative = _relative(query, tables)
    arguments = (query, key, value, relative, pad_key, pad_value, window_size, scale)
    _backends.kernel(operator, "forward", query)(*arguments, output, logsumexp)


def run_backward(
    operator: str,
    grad_output: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    tables: Tensor,
    pads: tuple[Tensor | None, Tensor | None],
    results: tuple[Tensor, Tensor],
    window_size: Sequence[int],
    scale: float,
    grad_qkv: tuple[Tensor | None, Tensor | None, Tensor | None],
    grad_tables: Tensor | None,
    grad_pads: tuple[Tensor | None, Tensor | None],
) -> None:
    """Write each gradient that is not None."""
    query, grad_query = qkv[0], grad_qkv[0]
    relative = _relative(query, tables)
    through_bias = grad_query is not None or grad_tables is not None
    grad_relative = torch.empty_like(relative) if through_bias else None
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    _backends.kernel(operator, "backward", query)(
        grad_output, *qkv, relative, *pads, *results, window_size, scale,
        *grad_qkv, grad_relative, *grad_pads,
    )  # fmt: skip
    if grad_relative is None:
        return
    if grad_query is not None:
        grad_query += (grad_relative.flatten(0, 3) @ tables).view(query.shape)
    if grad_tables is not None:
        torch.mm(grad_relative.flatten(0, 3).T, query.flatten(0, 3), out=grad_tables)


def _relative(query: Tensor, tables: Tensor) -> Tensor:
    """Each query's products with the tables, [B, H, W, heads, R]; one product whatever the strides
    (a batched `@` would multiply token by token, and choose by requires_grad)."""
    products = query.flatten(0, 3) @ tables.T
    return products.view(*query.shape[:-1], tables.shape[0])


def _not_supported(device: str, query: Tensor) -> str:
    if query.device.type != device:
        return f"query is on {query.device}"
    return "float64 has the reference alone" if query.dtype == torch.float64 else ""


def _not_supported_by_triton(query: Tensor) -> str:
    return _not_supported("cpu" if _backends.interpreted() else "cuda", query)


for operator in (NAME, "window_rel_pos_attention"):  # both run the same kernels
    _backends.register(
        operator,
        {
            "triton": _backends.module(f"vfmk.kernels.{NAME}", _not_supported_by_triton),
            "cpu": _backends.native(NAME, functools.partial(_not_supported, "cpu")),
            "reference": _backends.module(f"vfmk.reference.{NAME}", lambda query: ""),
        },
    )
