"""Tensors that FSDP has shared out between the processes, and the whole ones of a checkpoint."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """Every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tree(tree: Any) -> Any:
    """`whole` of every tensor in dictionaries and lists."""
    if isinstance(tree, dict):
        return {key: whole_tree(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole_tree(value) for value in tree]
    return whole(tree) if isinstance(tree, Tensor) else tree


def shared_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process has, shared out as `like` of the same shape is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
