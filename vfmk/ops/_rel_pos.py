"""What attention on a grid and inside its windows share: checks, tables, the run of a kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vfmk import _backends
from vfmk.ops import _contract
from vfmk.reference.rel_pos_attention import resized_tables
from vfmk.reference.sums import dtype_of_sums

MAX_HEAD_WIDTH = 128


def check_tables(
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


def checked_scale(operator: str, scale: float | None, head_width: int) -> float:
    return head_width**-0.5 if scale is None else _contract.as_float(operator, "scale", scale)


def distance_tables(rel_pos_h: Tensor, rel_pos_w: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Both tables as one [R, d], R = 2·rows − 1 + 2·columns − 1, each turned so that the entry for
    the key farthest above (left) comes first. Differentiable."""
    tables = resized_tables(rel_pos_h, rel_pos_w, window_size)
    return torch.cat([table.flip(0) for table in tables])


def new_log_sum_exp(query: Tensor) -> Tensor:
    """For each query [B, H, W, heads, d] one value, in the dtype of the sums: [B, heads, H, W]."""
    batch, height, width, heads, _ = query.shape
    return query.new_empty((batch, heads, height, width), dtype=dtype_of_sums(query))


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
    log_sum_exp: Tensor,
) -> None:
    """Run the kernel on [B, H, W, heads, d] tensors; the query's products with the tables are one
    matrix product, which backward does again rather than keep."""
    _contract.check_alike(
        operator, query, first="query", key=key, value=value, tables=tables,
        pad_key=pad_key, pad_value=pad_value,
    )  # fmt: skip
    relative = _relative(query, query.flatten(0, 3), tables)
    arguments = (query, key, value, relative, pad_key, pad_value, window_size, scale)
    _backends.kernel(operator, "forward", query, window_size)(*arguments, output, log_sum_exp)


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
    _contract.check_alike(operator, query, first="query", grad_output=grad_output, tables=tables)
    packed_query = query.flatten(0, 3)
    relative = _relative(query, packed_query, tables)
    through_bias = grad_query is not None or grad_tables is not None
    grad_relative = torch.empty_like(relative) if through_bias else None
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    _backends.kernel(operator, "backward", query, window_size)(
        grad_output, *qkv, relative, *pads, *results, window_size, scale,
        *grad_qkv, grad_relative, *grad_pads,
    )  # fmt: skip
    if grad_relative is None:
        return
    if grad_query is not None:
        grad_query += (grad_relative.flatten(0, 3) @ tables).view(query.shape)
    if grad_tables is not None:
        torch.mm(grad_relative.flatten(0, 3).T, packed_query, out=grad_tables)


def _relative(query: Tensor, packed_query: Tensor, tables: Tensor) -> Tensor:
    """Each query's products with the tables, [B, H, W, heads, R]; one product whatever the strides
    (a batched `@` would multiply token by token, and choose by requires_grad)."""
    return (packed_query @ tables.T).view(*query.shape[:-1], tables.shape[0])
