"""State dicts that must fit, name by name and shape by shape."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

SHOWN = 5  # names of each kind of fault


def misfits(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Why `tensors` are not for the places `own`, as what they lack and have; "" where they are."""
    faults = {
        "lacks": own.keys() - tensors.keys(),
        "has a stray": tensors.keys() - own.keys(),
        "has": {
            f"{name} {list(tensors[name].shape)}, expected {list(own[name].shape)}"
            for name in own.keys() & tensors.keys()
            if tensors[name].shape != own[name].shape
        },
    }
    return "; ".join(f"{verb} {_listed(items)}" for verb, items in faults.items() if items)


def fill(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy `tensors` into those of the same names.

    Raises:
        ValueError: names or shapes differ; they are named, after `source`. Nothing is copied then.
    """
    if faults := misfits(own, tensors):
        raise ValueError(f"{source} does not fit: it {faults}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _listed(items: Iterable[str]) -> str:
    names = sorted(items)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
