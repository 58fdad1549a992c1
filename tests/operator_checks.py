"""What every operator must satisfy, for an operator's tests to parametrise.

A call is a function of tensors: `Call(ops.NAME, reference.NAME, eager, kwargs)`, where `eager` is
the best that plain PyTorch does for the same mathematics in the same dtype.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import vfmk

# (backend, device) on which an operator's tests run; the GPU ones where a GPU is at hand.
TARGETS = (
    pytest.param(("reference", "cpu"), id="reference-cpu"),
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
    pytest.param(("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu),
)
# One rounding of the result: no operator in this dtype can be asked to do better.
ROUNDING = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float16, torch.bfloat16)}


@dataclass(frozen=True)
class Call:
    """One operator with its keyword arguments, and what it is compared with."""

    operator: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *args: Tensor | None) -> Tensor:
        return self.operator(*args, **self.kwargs)

    @property
    def name(self) -> str:
        return self.operator.__name__


@contextmanager
def target(operator: str, backend: str) -> Iterator[None]:
    """Run `operator` on `backend`; skips the test, with the reason, where it cannot."""
    if reason := vfmk.backends()[operator][backend]:
        pytest.skip(f"{backend}: {reason}")
    with vfmk.use_backend(backend):
        yield


def relative_error(actual: Tensor, truth: Tensor, least: float = 0.0) -> float:
    """‖actual − truth‖ / ‖truth‖, or / `least` if that is larger, in float64.

    ‖actual‖ where the truth is zero. NaN never passes a comparison.
    """
    actual, truth = actual.detach().cpu().double(), truth.detach().cpu().double()
    norm = max(float(truth.norm()), least) or 1.0
    return float((actual - truth).norm()) / norm


def value_and_gradients(function: Callable[..., Tensor], args: tuple[Tensor | None, ...]) -> list:
    """The output, then the gradient of each tensor argument, for one fixed cotangent."""
    leaves = [None if arg is None else preserving_leaf(arg) for arg in args]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(output.numel())
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    output.backward(cotangent.to(output.device, output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def preserving_leaf(tensor: Tensor) -> Tensor:
    """A leaf that requires grad and has the same storage and strides."""
    return tensor.detach().requires_grad_(True)


def check_accuracy(
    call: Call, args: tuple[Tensor | None, ...], fp32_limit: float, least_share: float = 1e-12
) -> None:
    """Output and every gradient against the float64 reference, on the same rounded inputs.

    fp32 within `fp32_limit`; half precision no worse than 1.5 times eager's error in that dtype.
    A result below `least_share` of the largest, where great numbers cancel, is measured by that.
    """
    doubles = tuple(None if arg is None else arg.detach().cpu().double() for arg in args)
    truth = value_and_gradients(lambda *a: call.reference(*a, **call.kwargs), doubles)
    ours = value_and_gradients(call, args)
    least = least_share * max(float(true.norm()) for true in truth)
    dtype = ours[0].dtype
    if dtype == torch.float32:
        limits = [fp32_limit] * len(truth)
    elif dtype == torch.float64:
        limits = [1e-13] * len(truth)
    else:
        theirs = value_and_gradients(lambda *a: call.eager(*a, **call.kwargs), args)
        limits = [
            1.5 * max(relative_error(value, true, least), ROUNDING[dtype])
            for value, true in zip(theirs, truth, strict=True)
        ]
    for index, (value, true, limit) in enumerate(zip(ours, truth, limits, strict=True)):
        what = "output" if index == 0 else f"gradient {index - 1}"
        assert value.dtype == dtype, f"{what} is {value.dtype}"
        assert relative_error(value, true, least) <= limit, what


def check_deterministic(call: Call, args: tuple[Tensor | None, ...]) -> None:
    """The same bits on each run, forward and backward."""
    first, second = value_and_gradients(call, args), value_and_gradients(call, args)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_cotangents(call: Call, args: tuple[Tensor | None, ...]) -> None:
    """Strides of zero, as `.sum(dim)` gives them, and slices of what is wider and NaN: the same
    bits as for a dense copy."""
    leaves = [None if arg is None else preserving_leaf(arg) for arg in args]
    inputs = [leaf for leaf in leaves if leaf is not None]
    output = call(*leaves)
    dense = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    dense = dense.to(output.device, output.dtype)
    cotangents = [
        dense.narrow(dim, 0, 1).expand_as(dense) for dim, size in enumerate(dense.shape) if size > 1
    ]
    cotangents.append(dense.new_tensor(0.5).expand_as(dense))
    for step in (1, 2):
        wider = dense.new_full([step * size + 2 for size in dense.shape], torch.nan)
        cotangents.append(wider[tuple(slice(1, -1, step) for _ in dense.shape)].copy_(dense))
    for cotangent in cotangents:
        ours, expected = (
            torch.autograd.grad(output, inputs, grad, retain_graph=True)
            for grad in (cotangent, cotangent.contiguous())
        )
        for one, other in zip(ours, expected, strict=True):
            assert torch.equal(one, other), cotangent.stride()


def check_threads(call: Call, args: tuple[Tensor | None, ...], limit: float = 0.0) -> None:
    """The same bits with one thread as with two; or within `limit`, where torch computes a part."""
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(value_and_gradients(call, args))
        finally:
            torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert relative_error(two, one) <= limit


def check_every_element_written(call: Call, args: tuple[Tensor | None, ...]) -> None:
    """Nothing of what the operator allocates stays uninitialised (torch fills it with NaN)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        results = value_and_gradients(call, args)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(result.isfinite().all() for result in results)


class _Backwards(TorchDispatchMode):
    """Counts the gradients that an operator's backward made: its outputs that are not empty."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.name, self.made = f"vfmk::{operator}_backward", 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        outputs = func(*args, **(kwargs or {}))
        if func.name() == self.name:
            self.made += sum(output.numel() > 0 for output in outputs)
        return outputs


def check_unwanted_gradients(call: Call, args: tuple[Tensor | None, ...]) -> None:
    """Asking for one gradient alone gives the same bits, and no other is made."""
    every = value_and_gradients(call, args)[1:]
    present = [i for i, arg in enumerate(args) if arg is not None]
    for index, expected in zip(present, every, strict=True):
        leaves = [None if a is None else a.detach() for a in args]
        leaves[index] = preserving_leaf(args[index])
        output = call(*leaves)
        generator = torch.Generator().manual_seed(output.numel())
        cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        with _Backwards(call.name) as backwards:
            output.backward(cotangent.to(output.device, output.dtype))
        assert torch.equal(leaves[index].grad, expected)
        assert backwards.made == 1


def check_gradcheck(call: Call, args: tuple[Tensor | None, ...]) -> None:
    """Analytic against numerical gradients in float64."""
    leaves = [None if arg is None else preserving_leaf(arg.double()) for arg in args]
    assert torch.autograd.gradcheck(call, leaves)


def check_opcheck(custom_op: Any, args: tuple[Any, ...]) -> None:
    """torch.library's own checks: schema, fake tensors, autograd registration, AOT dispatch."""
    torch.library.opcheck(custom_op, args)


def check_compile(
    call: Call, args: tuple[Tensor | None, ...], batched: int, limit: float = 0.0
) -> None:
    """One graph, the same bits as eager mode (or within `limit`, where torch computes a part), and
    one recompilation at most for new batch sizes.

    The first `batched` arguments have the batch in front.
    """
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected, actual = value_and_gradients(call, args), value_and_gradients(compiled, args)
    for one, other in zip(expected, actual, strict=True):
        assert relative_error(other, one) <= limit
    counted = torch.compile(lambda *a: call(*a), fullgraph=True, backend=graphs)
    for batch in (2, 3, 4, 5):
        counted(*(torch.cat([arg[:1]] * batch) for arg in args[:batched]), *args[batched:])
    assert graphs.frame_count <= 2


def check_export(call: Call, args: tuple[Tensor | None, ...]) -> None:
    """torch.export keeps the operator as one node and gives the same bits."""

    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor | None) -> Tensor:
            return call(*inputs)

    program = torch.export.export(Module(), args)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any(call.name in name for name in targets)
    assert torch.equal(program.module()(*args), call(*args))


def check_autocast(call: Call, args: tuple[Tensor | None, ...], dtype: torch.dtype) -> None:
    """Under autocast the result is in its dtype, and gradients in the arguments' own; after a
    forward outside it, backward within it is as outside."""
    device = args[0].device.type
    with torch.autocast(device, dtype):
        output, *gradients = value_and_gradients(call, args)
    lower = tuple(None if arg is None else arg.to(dtype) for arg in args)
    assert torch.equal(output, call(*lower))
    assert all(gradient.dtype == args[0].dtype for gradient in gradients)

    leaves = [None if arg is None else preserving_leaf(arg) for arg in args]
    inputs = [leaf for leaf in leaves if leaf is not None]
    output = call(*leaves)
    outside = torch.autograd.grad(output.square().sum(), inputs, retain_graph=True)
    with torch.autocast(device, dtype):
        within = torch.autograd.grad(output.square().sum(), inputs)
    assert all(torch.equal(one, other) for one, other in zip(within, outside, strict=True))
