"""Custom ops that eager code reaches by a shorter way than PyTorch's dispatcher.

A custom op in Python passes the dispatcher once for autograd and once for the device, with Python
in between: that takes longer than many a kernel. Eager code on plain tensors that nothing looks
into needs none of it, so there the implementation is called at once, by an autograd.Function where
a gradient is wanted. All else (torch.compile, export, modes, transforms, tracers, profilers, fake
tensors and other subclasses) meets the custom op.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _any_requires_grad,
    _are_functorch_transforms_active,
    _dispatch_keys,
    _dispatch_tls_is_dispatch_key_included,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import _profiler_enabled, forward_ad
from torch.compiler import is_compiling

PLAIN_TYPES = frozenset((Tensor, nn.Parameter))
# What the dispatcher may know of a plain tensor; of others, that they are negative, zero, sparse,
# batched, …, which it sees to itself.
PLAIN = ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")
SPECIAL_KEYS = ~functools.reduce(
    DispatchKeySet.__or__,
    [DispatchKeySet(getattr(DispatchKey, key)) for key in (*PLAIN, "ADInplaceOrView")],
).raw_repr()
NO_TENSORS = frozenset((int, float, bool, list, tuple, type(None)))  # isinstance takes longer
PRE_DISPATCH = DispatchKey.PreDispatch


class Operator:
    """The custom op vfmk::`name`, called like its implementation."""

    def __init__(self, name: str, implementation: Callable[..., Any]) -> None:
        self._implementation = implementation
        self._custom_op = torch.library.custom_op(f"vfmk::{name}", implementation, mutates_args=())
        self._overload = getattr(torch.ops.vfmk, name).default
        self._function: type[torch.autograd.Function] | None = None
        self.register_fake = self._custom_op.register_fake

    def register_autograd(
        self, gradients: Callable[..., Any], *, setup_context: Callable[..., None]
    ) -> None:
        """As `torch.library.CustomOpDef.register_autograd`."""
        self._custom_op.register_autograd(gradients, setup_context=setup_context)

        # In one method: apart, PyTorch would look up the signature in each call.
        def forward(ctx: Any, *args: Any) -> Any:
            output = self._implementation(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
        self._function = type(self._overload._opname, (torch.autograd.Function,), methods)

    def __call__(self, *args: Any) -> Any:
        if not is_plain(*args):
            if forward_ad._current_level >= 0:
                self._check_no_tangent(args)
            return self._overload(*args)
        if not needs_gradient(*args):
            return self._implementation(*args)
        if self._function is None:
            return self._overload(*args)  # which says that it has no gradient
        return self._function.apply(*args)

    def _check_no_tangent(self, args: tuple[Any, ...]) -> None:
        """PyTorch would lose them in silence."""
        for arg in args:
            if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
                raise RuntimeError(f"{self._overload._opname}: has no forward-mode derivative")


def define(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorates the implementation of vfmk::`name`."""
    return lambda implementation: Operator(name, implementation)


def is_plain(*args: Any) -> bool:
    """Whether nothing but autograd and autocast has to know of a call with these arguments."""
    if is_watched():
        return False
    for arg in args:  # no generator: this is what a call costs before it begins
        kind = type(arg)
        if kind in PLAIN_TYPES:
            if _dispatch_keys(arg).raw_repr() & SPECIAL_KEYS:
                return False
        elif kind not in NO_TENSORS and isinstance(arg, Tensor):
            return False
    return True


def is_watched() -> bool:
    """Whether a compiler, a mode, a transform, a tracer or a profiler is at work."""
    return bool(
        is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or _get_tracing_state()
        or _profiler_enabled()
        or forward_ad._current_level >= 0
        or _dispatch_tls_is_dispatch_key_included(PRE_DISPATCH)
    )


def needs_gradient(*args: Any) -> bool:
    return torch.is_grad_enabled() and _any_requires_grad(*args)
