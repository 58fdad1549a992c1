"""VFM-Adapter: a bottleneck that mixes a local, per-sample convolution with global attention.

Equations and symbols: VFM-Adapter (AAAI 2025), "Adapting Visual Foundation Models for Dense
Prediction with Dynamic Hybrid Operation Mapping".
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmk import ops
from vfmk.nn.config import VFMAdapterConfig
from vfmk.nn.hypernetwork import Hypernetwork

ALIGNMENT = 8  # columns: GPU matrix products are fast where rows begin at multiples of 16 bytes


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class VFMAdapter(nn.Module):
    """The adapter beside one sub-layer. It starts as the zero function.

    Args:
        width: C, channels of the tokens.
        config: the shape.
    """

    def __init__(self, width: int, config: VFMAdapterConfig) -> None:
        super().__init__()
        rank, tokens = config.rank, config.token_dim
        self.num_heads = config.num_heads
        self.scale = config.scale
        self.dynamic = config.conv != "static"
        self.dense = config.conv == "dense"
        self.down = nn.Linear(width, rank)  # W_d, b_d
        self.up = nn.Linear(rank, width)  # W_u, b_u
        self.dropout = nn.Dropout(config.dropout)
        if self.dynamic:
            self.to_tokens = nn.Sequential(
                nn.Linear(width, tokens),  # W_m1, b_m1
                nn.ReLU(),
                nn.Linear(tokens, tokens),  # W_m2, b_m2
            )
        else:
            self.kernels = nn.Parameter(
                torch.empty(1, rank, config.kernel_size, config.kernel_size)
            )
        self.qkv = nn.Linear(rank, 3 * rank) if config.global_branch else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.down, self.qkv):
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
        if self.dynamic:
            for module in self.to_tokens:
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
        else:
            nn.init.kaiming_uniform_(self.kernels, a=5**0.5)  # as nn.Conv2d
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(
        self, x: Tensor, u: Tensor, queries: Tensor | None, hypernetwork: Hypernetwork | None
    ) -> Tensor:
        """x + s·A(u), where u is the sub-layer's normalised input. All are [B, H, W, C].

        `queries` [M, D] and `hypernetwork` are shared between adapters; None if conv is "static".
        """
        hidden, tokens = self._project(u)
        hidden = quick_gelu(hidden)
        kernels = self.kernels if tokens is None else self._generate(tokens, queries, hypernetwork)
        channels_last = hidden.permute(0, 3, 1, 2)
        convolve = ops.dynamic_conv2d if self.dense else ops.dynamic_depthwise_conv2d
        mixed = convolve(channels_last, kernels).permute(0, 2, 3, 1)
        if self.qkv is not None:
            attended = ops.adapter_attention(
                hidden.flatten(1, 2), self.qkv.weight, self.qkv.bias, self.num_heads
            )
            mixed = mixed + attended.view_as(mixed)
        return self._add_up(x, self.dropout(quick_gelu(mixed)))

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """W_d u + b_d [B, H, W, r] and W_m1 u + b_m1 [B, H, W, D], reading u once."""
        if not self.dynamic:
            return self.down(u), None
        first = self.to_tokens[0]
        assert isinstance(first, nn.Linear)
        weight = torch.cat([self.down.weight, first.weight])
        bias = torch.cat([self.down.bias, first.bias])
        hidden, tokens = F.linear(u, weight, bias).split(
            [self.down.out_features, first.out_features], dim=-1
        )
        return hidden, tokens

    def _generate(
        self, tokens: Tensor, queries: Tensor | None, hypernetwork: Hypernetwork | None
    ) -> Tensor:
        assert queries is not None
        assert hypernetwork is not None
        tokens = self.to_tokens[2](F.relu(tokens)).flatten(1, 2)  # p: [B, N, D]
        code = ops.attention_pool(tokens, queries).sum(1)  # z: [B, D]
        return hypernetwork(code)

    def _add_up(self, x: Tensor, g: Tensor) -> Tensor:
        """x + s·(W_u g + b_u) as a matrix product onto x: nothing of x's size but the output.

        The bias is a column of W_u, against ones in g. In x's dtype, since autocast would round x,
        and in its memory layout: SAM's tokens are [B, C, H, W] in memory, as its convolution left
        them, and its neck computes other bits on another layout.
        """
        with torch.autocast(x.device.type, enabled=False):
            g = F.pad(g.to(x.dtype).flatten(1, 2), (0, ALIGNMENT), value=1.0)  # [B, N, r + 8]
            weight = torch.cat([self.up.weight, self.up.bias[:, None]], dim=1).to(x.dtype)
            weight = F.pad(weight, (0, ALIGNMENT - 1))  # [C, r + 8]
            rows = x.flatten(1, 2)  # [B, N, C]
            if rows.mT.is_contiguous():
                weight = weight.expand(len(x), -1, -1)
                output = torch.baddbmm(rows.mT, weight, g.mT, alpha=self.scale).mT
            else:
                output = torch.addmm(
                    rows.flatten(0, 1), g.flatten(0, 1), weight.T, alpha=self.scale
                )
            return output.view(x.shape)


class VFMAdapterStack(nn.Module):
    """The adapters of a whole encoder, and what they share: query tokens and hypernetworks.

    Args:
        width: C, channels of the encoder.
        layers: indices of the blocks that get adapters.
        config: the shape.
    """

    def __init__(self, width: int, layers: tuple[int, ...], config: VFMAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.queries: nn.Parameter | None = None  # T
        self.hypernetworks = nn.ModuleDict()
        if config.conv != "static":
            self.queries = nn.Parameter(torch.empty(config.num_queries, config.token_dim))
            nn.init.trunc_normal_(self.queries, std=0.02)
            for sublayer in config.sublayers:
                self.hypernetworks[sublayer] = Hypernetwork(
                    config.token_dim,
                    config.low_dim,
                    config.rank,
                    config.kernel_size,
                    dense=config.conv == "dense",
                )
        self.layers = nn.ModuleDict(
            {
                str(layer): nn.ModuleDict(
                    {sublayer: VFMAdapter(width, config) for sublayer in config.sublayers}
                )
                for layer in layers
            }
        )

    def forward(self, x: Tensor, u: Tensor, layer: int, sublayer: str) -> Tensor:
        """x + s·A(u) with the adapter A beside `sublayer` of block `layer`; x where there is none.

        x, u: [B, H, W, C].
        """
        if str(layer) not in self.layers or sublayer not in self.config.sublayers:
            return x
        hypernetwork = self.hypernetworks[sublayer] if self.hypernetworks else None
        adapter = self.layers[str(layer)][sublayer]  # type: ignore[index]
        return adapter(x, u, self.queries, hypernetwork)
