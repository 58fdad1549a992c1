"""The hypernetwork: from the pooled tokens of an image to its own convolution kernels."""

from torch import Tensor, nn


class Hypernetwork(nn.Module):
    """Depthwise kernels for each sample, from its code.

    One is shared by the adapters beside every attention, one by those beside every MLP.

    Args:
        token_dim: D, width of the code.
        low_dim: l, width of what stands for one channel before its kernel.
        rank: r, channels that get a kernel.
        kernel_size: k.

    Source: VFM-Adapter (AAAI 2025): G = reshape(W_h2 z + b_h2), K = G W_h1 + b_h1.
    """

    def __init__(self, token_dim: int, low_dim: int, rank: int, kernel_size: int) -> None:
        super().__init__()
        self.rank = rank
        self.kernel_size = kernel_size
        self.channel_codes = nn.Linear(token_dim, rank * low_dim)  # W_h2, b_h2
        self.kernels = nn.Linear(low_dim, kernel_size**2)  # W_h1, b_h1
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.channel_codes, self.kernels):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, code: Tensor) -> Tensor:
        """code [B, D] → kernels [B, r, k, k]."""
        channel_codes = self.channel_codes(code).unflatten(1, (self.rank, -1))  # [B, r, l]
        return self.kernels(channel_codes).unflatten(2, (self.kernel_size, self.kernel_size))

    def extra_repr(self) -> str:
        return f"rank={self.rank}, kernel_size={self.kernel_size}"
