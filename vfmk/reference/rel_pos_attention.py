"""SAM's attention with decomposed relative position, in plain PyTorch: scores in full."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmk.reference.sums import dtype_of_sums


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
    """See `vfmk.ops.rel_pos_attention`."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    grid = query.unflatten(2, grid_size)  # [B, heads, H, W, d]
    to_rows, to_columns = (
        table[_distances(size)]  # [size, size, d]: from a query's place to a key's
        for table, size in zip(
            resized_tables(rel_pos_h, rel_pos_w, grid_size), grid_size, strict=True
        )
    )
    bias_h = torch.einsum("bnhwd,hkd->bnhwk", grid, to_rows)
    bias_w = torch.einsum("bnhwd,wkd->bnhwk", grid, to_columns)
    bias = (bias_h[..., :, None] + bias_w[..., None, :]).flatten(4).flatten(2, 3)
    scores = scale * query @ key.transpose(2, 3) + bias
    return scores.softmax(-1) @ value


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
    """See `vfmk.ops.window_rel_pos_attention`."""
    size = (window_size, window_size) if isinstance(window_size, int) else window_size
    windows = _partition(qkv, qkv_bias, size)  # [B * windows, rows * columns, 3 * heads * d]
    query, key, value = windows.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    output = rel_pos_attention(query, key, value, rel_pos_h, rel_pos_w, size, scale=scale)
    return _merge(output.transpose(1, 2).flatten(2), size, qkv.shape[:3])


def resized_tables(
    rel_pos_h: Tensor, rel_pos_w: Tensor, grid_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Both tables at 2·size − 1 entries, interpolated linearly where they have another length."""

    def resized(table: Tensor, length: int) -> Tensor:
        if len(table) == length:
            return table
        return F.interpolate(table.T[None], size=length, mode="linear")[0].T

    height, width = grid_size
    return resized(rel_pos_h, 2 * height - 1), resized(rel_pos_w, 2 * width - 1)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    relative: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    window_size: tuple[int, int],
    scale: float,
    output: Tensor,
    log_sum_exp: Tensor,
) -> None:
    """Write `output` [B, H, W, heads, d] and `log_sum_exp` [B, heads, H, W].

    query, key, value: [B, H, W, heads, d]; relative [B, H, W, heads, R], the query's products with
    all 2·rows − 1 distances up and down, then all 2·columns − 1 left and right; pad_key, pad_value
    [heads, d] stand beyond the grid, None where windows do not reach there.
    """
    grid = query.shape[:3]
    query, key, value, relative = _in_windows(
        query, key, value, relative, pad_key, pad_value, window_size
    )
    scores = _scores(query, key, relative, window_size, scale)
    output.copy_(_merge_heads(scores.softmax(-1) @ value, window_size, grid))
    sums = scores.logsumexp(-1, keepdim=True)  # [windows, heads, N, 1]
    log_sum_exp.copy_(_merge_heads(sums, window_size, grid)[..., 0].permute(0, 3, 1, 2))


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    relative: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    output: Tensor,
    log_sum_exp: Tensor,
    window_size: tuple[int, int],
    scale: float,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    grad_relative: Tensor | None,
    grad_pad_key: Tensor | None,
    grad_pad_value: Tensor | None,
) -> None:
    """Write each gradient that is not None."""
    grid = query.shape[:3]
    query, key, value, relative = _in_windows(
        query, key, value, relative, pad_key, pad_value, window_size
    )
    grad = _to_windows(grad_output, None, window_size).to(query.dtype)
    probabilities = _scores(query, key, relative, window_size, scale).softmax(-1)
    grad_probabilities = grad @ value.transpose(2, 3)
    mean = (grad_probabilities * probabilities).sum(-1, keepdim=True)
    grad_scores = probabilities * (grad_probabilities - mean)
    if grad_query is not None:
        grad_query.copy_(_merge_heads(scale * grad_scores @ key, window_size, grid))
    grad_keys = scale * grad_scores.transpose(2, 3) @ query
    grad_values = probabilities.transpose(2, 3) @ grad
    for windows, gradient, pad_gradient in (
        (grad_keys, grad_key, grad_pad_key),
        (grad_values, grad_value, grad_pad_value),
    ):
        if gradient is not None:
            gradient.copy_(_merge_heads(windows, window_size, grid))
        if pad_gradient is not None:
            within = _merge_heads(windows, window_size, grid)
            pad_gradient.copy_(windows.sum((0, 2)) - within.sum((0, 1, 2)))
    if grad_relative is not None:
        by_place = grad_scores.unflatten(3, window_size)
        up_down, left_right = _relative_index(window_size, query.device)
        sums = torch.zeros_like(relative)
        sums.scatter_(3, up_down.expand_as(by_place[..., 0]), by_place.sum(4))
        sums.scatter_(3, left_right.expand_as(by_place[..., 0, :]), by_place.sum(3))
        grad_relative.copy_(_merge_heads(sums, window_size, grid))


def _scores(
    query: Tensor, key: Tensor, relative: Tensor, window_size: tuple[int, int], scale: float
) -> Tensor:
    """[windows, heads, N, N]."""
    up_down, left_right = _relative_index(window_size, query.device)
    leading = relative.shape[:2]
    bias_h = relative.gather(3, up_down.expand(*leading, -1, -1))  # [windows, heads, N, rows]
    bias_w = relative.gather(3, left_right.expand(*leading, -1, -1))
    bias = (bias_h[..., :, None] + bias_w[..., None, :]).flatten(3)
    return scale * query @ key.transpose(2, 3) + bias


def _relative_index(window_size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where a query's `relative` holds its scores with each row, [N, rows], and each column."""
    rows, columns = window_size
    y = torch.arange(rows, device=device)
    x = torch.arange(columns, device=device)
    up_down = rows - 1 - y[:, None] + y
    left_right = 2 * rows - 1 + columns - 1 - x[:, None] + x
    return up_down.repeat_interleave(columns, 0), left_right.repeat(rows, 1)


def _distances(size: int) -> Tensor:
    """The table's index for a query at place p and a key at place q: [size, size]."""
    place = torch.arange(size)
    return place[:, None] - place + size - 1


def _in_windows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    relative: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    window_size: tuple[int, int],
) -> list[Tensor]:
    """Each as [windows, heads, N, ·], in the dtype of the sums."""
    dtype = dtype_of_sums(query)
    tensors = ((query, None), (key, pad_key), (value, pad_value), (relative, None))
    return [_to_windows(tensor, pad, window_size).to(dtype) for tensor, pad in tensors]


def _to_windows(tensor: Tensor, pad: Tensor | None, window_size: tuple[int, int]) -> Tensor:
    """[B, H, W, heads, d] → [windows, heads, N, d]; beyond the grid, `pad` [heads, d] or zeros."""
    heads = tensor.shape[3]
    flat_pad = tensor.new_zeros(heads * tensor.shape[4]) if pad is None else pad.flatten()
    windows = _partition(tensor.flatten(3), flat_pad, window_size)
    return windows.unflatten(2, (heads, -1)).transpose(1, 2)


def _merge_heads(windows: Tensor, window_size: tuple[int, int], grid: torch.Size) -> Tensor:
    """The inverse of `_to_windows`, without what lies beyond the grid."""
    heads = windows.shape[1]
    tokens = windows.transpose(1, 2).flatten(2)
    return _merge(tokens, window_size, grid).unflatten(3, (heads, -1))


def _partition(tokens: Tensor, pad: Tensor, window_size: tuple[int, int]) -> Tensor:
    """[B, H, W, C] → [B * windows, rows * columns, C]; beyond the grid stands `pad` [C]."""
    batch, height, width, channels = tokens.shape
    rows, columns = window_size
    down, right = -(-height // rows), -(-width // columns)
    padded = pad.expand(batch, down * rows, right * columns, channels).clone()
    padded[:, :height, :width] = tokens
    windows = padded.unflatten(2, (right, columns)).unflatten(1, (down, rows))
    return windows.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def _merge(windows: Tensor, window_size: tuple[int, int], grid: torch.Size) -> Tensor:
    """The inverse of `_partition`, without what lies beyond the grid (B, H, W)."""
    batch, height, width = grid
    rows, columns = window_size
    down, right = -(-height // rows), -(-width // columns)
    tokens = windows.unflatten(1, window_size).unflatten(0, (batch, down, right))
    return tokens.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]
