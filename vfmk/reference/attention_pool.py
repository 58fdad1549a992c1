"""Attention pooling in plain PyTorch."""

import torch
from torch import Tensor


def attention_pool(tokens: Tensor, queries: Tensor, *, scale: float = 1.0) -> Tensor:
    """For every query, the mean of the tokens weighted by their softmax similarity to it.

    Args:
        tokens: [B, N, D].
        queries: [M, D], the same for the whole batch.
        scale: factor of the dot products.

    Returns:
        [B, M, D]: softmax over the N tokens of scale·⟨token, query⟩, times the tokens.

    Source: VFM-Adapter (AAAI 2025), the query tokens of the parameter generator.
    """
    attention = torch.softmax(scale * queries @ tokens.transpose(1, 2), dim=2)  # [B, M, N]
    return attention @ tokens
