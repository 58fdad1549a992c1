"""Self-attention in an adapter's bottleneck, in plain PyTorch."""

from torch import Tensor
from torch.nn import functional as F


def adapter_attention(
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    num_heads: int = 1,
    *,
    scale: float | None = None,
) -> Tensor:
    """Multi-head self-attention over N tokens: three projections in, none out.

    Args:
        input: [B, N, r].
        qkv_weight: [3r, r], rows for the queries, then the keys, then the values.
        qkv_bias: [3r].
        num_heads: a divisor of r.
        scale: factor of the dot products; by default 1/√(r / num_heads).

    Returns:
        [B, N, r].

    Source: VFM-Adapter (AAAI 2025), the global branch of hybrid operation mapping.
    """
    batch, tokens, rank = input.shape
    qkv = F.linear(input, qkv_weight, qkv_bias).view(batch, tokens, 3, num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, r / heads]
    output = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return output.transpose(1, 2).reshape(batch, tokens, rank)
