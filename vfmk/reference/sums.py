"""The rule that every operator sums by: in fp64 for float64, else in fp32."""

import torch
from torch import Tensor


def dtype_of_sums(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def in_dtype_of_sums(*tensors: Tensor) -> list[Tensor]:
    """All in that of the first."""
    return [tensor.to(dtype_of_sums(tensors[0])) for tensor in tensors]
