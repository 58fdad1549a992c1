"""The hypernetwork: from the pooled tokens of an image to its own convolution kernels."""

from torch import Tensor, nn


class Hypernetwork(nn.Module):
    """Convolution kernels for each sample, from its code.

    One is shared by the adapters beside every attention, one by those beside every MLP.

    Args:
        token_dim: D, width of the code.
        low_dim: l, width of what stands for one output channel before its kernels.
        rank: r, channels that get a kernel.
        kernel_size: k.
        dense: every output channel gets a kernel for each of the r input channels, not one alone.

    Source: VFM-Adapter (AAAI 2025): G = reshape(W_h2 z + b_h2), K = G W_h1 + b_h1.
    """

    def __init__(
        self, token_dim: int, low_dim: int, rank: int, kernel_size: int, *, dense: bool = False
    ) -> None:
        super().__init__()
        self.rank = rank
        self.kernel_size = kernel_size
        self.dense = dense
        self.channel_codes = nn.Linear(token_dim, rank * low_dim)  # W_h2, b_h2
        self.kernels = nn.Linear(low_dim, (rank if dense else 1) * kernel_size**2)  # W_h1, b_h1
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.channel_codes, self.kernels):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, code: Tensor) -> Tensor:
        """code [B, D] → kernels [B, r, k, k]; dense [B, r, r, k, k], output channels first."""
        channel_codes = self.channel_codes(code).unflatten(1, (self.rank, -1))  # [B, r, l]
        size = (self.kernel_size, self.kernel_size)
        return self.kernels(channel_codes).unflatten(2, (self.rank, *size) if self.dense else size)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, kernel_size={self.kernel_size}, dense={self.dense}"
