"""What a VFM-Adapter is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SUBLAYERS = ("attn", "mlp")
CONVOLUTIONS = ("depthwise", "dense", "static")


@dataclass(frozen=True)
class VFMAdapterConfig:
    """The shape of the adapters of one model. A field out of range is a ValueError that names it.

    Args:
        rank: r, channels of the bottleneck.
        kernel_size: k, side of the local branch's kernels; odd.
        conv: "depthwise" generates each sample's r kernels of k×k, "dense" its r×r kernels, which
            mix the channels; "static" learns one set of r.
        global_branch: whether self-attention over all tokens is added to the convolution.
        num_heads: heads of that attention; a divisor of rank.
        token_dim: D, width of the tokens from which kernels are generated.
        low_dim: l, width of the hypernetwork's code for each bottleneck channel.
        num_queries: M, query tokens that pool the image into that code.
        scale: s, factor of every adapter's output.
        dropout: probability, before the up-projection, in training.
        sublayers: which sub-layers of a block get an adapter beside them: "attn", "mlp".
        layers_to_transform: indices of the encoder's blocks; None for all.
        modules_to_save: submodules of the base, by dotted name, to train and save whole, such as
            "mask_decoder" or "image_encoder.neck".
    """

    rank: int = 32
    kernel_size: int = 3
    conv: str = "depthwise"
    global_branch: bool = True
    num_heads: int = 1
    token_dim: int = 64
    low_dim: int = 8
    num_queries: int = 16
    scale: float = 1.0
    dropout: float = 0.1
    sublayers: tuple[str, ...] = SUBLAYERS
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("rank", "kernel_size", "num_heads", "token_dim", "low_dim", "num_queries"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                self._refuse(field, "a positive int")
        if self.kernel_size % 2 == 0:
            self._refuse("kernel_size", "odd, so that the convolution is centred")
        if self.rank % self.num_heads:
            self._refuse("num_heads", f"a divisor of rank={self.rank}")
        if self.conv not in CONVOLUTIONS:
            self._refuse("conv", f"one of {CONVOLUTIONS}")
        if not isinstance(self.global_branch, bool):
            self._refuse("global_branch", "a bool")
        if not isinstance(self.scale, int | float) or not abs(self.scale) < float("inf"):
            self._refuse("scale", "a finite number")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            self._refuse("dropout", "a number in [0, 1)")
        for field in ("sublayers", "layers_to_transform", "modules_to_save"):
            self._freeze(field)
        if not self.sublayers or not set(self.sublayers) <= set(SUBLAYERS):
            self._refuse("sublayers", f"one or more of {SUBLAYERS}")
        layers = self.layers_to_transform
        if layers is not None and not (layers and all(type(i) is int and i >= 0 for i in layers)):
            self._refuse("layers_to_transform", "None, or one or more indices from 0")
        if not all(isinstance(name, str) and name for name in self.modules_to_save):
            self._refuse("modules_to_save", "names of submodules")

    def _freeze(self, field: str) -> None:
        """Turn a list, as JSON gives it, into a tuple without repetitions."""
        value: Any = getattr(self, field)
        if value is None and field == "layers_to_transform":
            return
        if isinstance(value, str) or not isinstance(value, Sequence):
            self._refuse(field, "a sequence")
        if len(set(value)) != len(value):
            self._refuse(field, "free of repetitions")
        object.__setattr__(self, field, tuple(value))

    def _refuse(self, field: str, expected: str) -> None:
        raise ValueError(
            f"VFMAdapterConfig: {field} must be {expected}, got {getattr(self, field)!r}"
        )
