"""Where an operator runs: Triton, the compiled library and plain PyTorch, by the same rules."""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vfmk import _backends


def register(
    operator: str,
    *,
    module: str | None = None,
    native: Sequence[str] = ("cpu",),
    names: tuple[str, ...] = _backends.BOTH,
    adapters: Mapping[str, Callable[..., Any]] | None = None,
) -> None:
    """Register the implementations of `module` (default: `operator`) in kernels, reference, csrc.

    `_backends.kernel` is to be asked with a tensor whose device and dtype are those of the call,
    then what else `not_supported` of the Triton module takes, where it has any.

    Args:
        native: devices that the compiled library has kernels for.
        names: the kernels that there are.
        adapters: of kernels that the compiled library has with another signature, what gives those
            of Triton and PyTorch the same; each takes the kernel, then what the library's takes.
    """
    module = module or operator
    implementations = {
        "triton": _backends.module(
            f"vfmk.kernels.{module}",
            functools.partial(_not_supported_by_triton, module),
            names,
            adapters,
        ),
        "reference": _backends.module(
            f"vfmk.reference.{module}", lambda *call: "", names, adapters
        ),
    }
    for device in native:
        implementations[device] = _backends.native(
            module, functools.partial(_not_supported_on, device), names
        )
    _backends.register(operator, implementations)


def _not_supported_on(device: str, first: Tensor, *others: Any) -> str:
    """Why a backend of `device` cannot run what the reference can, or ""."""
    if first.device.type != device:
        return f"the tensors are on {first.device}"
    return "float64 has the reference alone" if first.dtype == torch.float64 else ""


def _not_supported_by_triton(module: str, first: Tensor, *others: Any) -> str:
    device = "cpu" if _backends.interpreted() else "cuda"
    if reason := _not_supported_on(device, first):
        return reason
    kernels = importlib.import_module(f"vfmk.kernels.{module}")
    return kernels.not_supported(first, *others) if hasattr(kernels, "not_supported") else ""
