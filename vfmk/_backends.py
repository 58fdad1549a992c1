"""Which implementation of an operator runs a call, and why each other one does not.

Every operator registers its implementations here once. A call takes the first of BACKENDS that can
run on this machine and whose `not_supported` finds nothing against the arguments. Both are matters
of fact: nothing is launched to see whether it works.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "cpu", "reference")
BOTH = ("forward", "backward")  # the kernels of a differentiable operator
LIBRARY = Path(__file__).with_name("libvfmk.so")


class Implementation(NamedTuple):
    """One operator on one backend.

    `not_supported(*args)` is "" or the reason why these arguments cannot run here. `load()` gives
    the kernels by name ("forward", "backward"), and is called on a machine that has the backend.
    """

    not_supported: Callable[..., str]
    load: Callable[[], dict[str, Callable[..., Any]]]


_operators: dict[str, dict[str, Implementation]] = {}
_native_kernels: dict[tuple[Any, ...], Callable[..., Any] | None] = {}
_forced = os.environ.get("VFMK_BACKEND") or None


class BackendError(RuntimeError):
    """No backend, or not the one asked for by name, can run a call."""


def register(operator: str, implementations: dict[str, Implementation]) -> None:
    _operators[operator] = implementations


def backends() -> dict[str, dict[str, str]]:
    """Every operator's backends on this machine.

    Returns {operator: {backend: ""}} where usable, the reason instead of "" where not. A usable
    backend may still not support some arguments (dtype, shape, device); a call that forces it with
    `use_backend` then says why.
    """
    return {
        operator: {backend: _missing(operator, backend) for backend in BACKENDS}
        for operator in sorted(_operators)
    }


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every vfmk operator on the backend `name` inside the block, or raise BackendError.

    Holds for the whole process, because autograd runs backward on threads of its own.
    VFMK_BACKEND, read when vfmk is imported, does the same from outside.
    """
    global _forced
    if torch.compiler.is_compiling():
        raise RuntimeError("use_backend: no effect inside torch.compile; put it around the call")
    previous, _forced = _forced, _checked(name, "use_backend")
    try:
        yield
    finally:
        _forced = previous


def kernel(operator: str, name: str, *args: Any) -> Callable[..., Any]:
    """The kernel `name` ("forward", "backward") of the backend that is to run `args`."""
    forced = _forced  # once: another thread may change it
    allowed = (_checked(forced, "VFMK_BACKEND"),) if forced else BACKENDS
    if backend := _chosen(operator, allowed, args):
        return _kernels(operator, backend)[name]
    wanted = f"the backend {forced!r} cannot run this call" if forced else "no backend can run it"
    reasons = [f"{backend}: {_reason(operator, backend, args)}" for backend in allowed]
    raise BackendError(f"{operator}: {wanted}\n  " + "\n  ".join(reasons))


def native_kernel(operator: str, name: str, tensor: Tensor) -> Callable[..., Any] | None:
    """The kernel `name` of the native library, where `kernel` would take that for every call whose
    first tensor has `tensor`'s device and dtype. Looked for once."""
    forced = _forced  # once: another thread may change it
    facts = operator, name, tensor.is_cpu, tensor.is_cuda, tensor.dtype, forced
    try:
        return _native_kernels[facts]
    except KeyError:
        backend = _chosen(operator, (forced,) if forced else BACKENDS, (tensor,))
        native = _kernels(operator, backend)[name] if backend in ("cuda", "cpu") else None
        return _native_kernels.setdefault(facts, native)


def _chosen(operator: str, allowed: Sequence[str], args: tuple[Any, ...]) -> str | None:
    return next((name for name in allowed if not _reason(operator, name, args)), None)


def _reason(operator: str, backend: str, args: tuple[Any, ...]) -> str:
    return _missing(operator, backend) or _operators[operator][backend].not_supported(*args)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: {name!r} is no backend; expected one of {', '.join(BACKENDS)}")
    return name


@functools.cache
def _kernels(operator: str, backend: str) -> dict[str, Callable[..., Any]]:
    return _operators[operator][backend].load()


@functools.cache
def _missing(operator: str, backend: str) -> str:
    """Why `operator` cannot run on `backend` whatever the arguments, or ""."""
    if backend not in _operators[operator]:
        return f"{operator} has no {backend} implementation"
    return {"cuda": _no_cuda, "triton": _no_triton, "cpu": _no_library}.get(backend, lambda: "")()


@functools.cache
def _no_library() -> str:
    if not LIBRARY.exists():
        return (
            "the native library was not built (VFMK_NATIVE=0, or a source tree not yet installed);"
            " see README, Install"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the native library does not load: {error}"
    return ""


@functools.cache
def _no_gpu() -> str:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is visible"
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


@functools.cache
def _no_cuda() -> str:
    if reason := _no_library():
        return reason
    architectures = build_info().split("cuda: ")[1]
    if architectures == "none":
        return "the native library was built without CUDA (VFMK_CUDA=0, or no nvcc)"
    if reason := _no_gpu():
        return reason
    capability = torch.cuda.get_device_capability()
    if not any(_runs_on(capability, built) for built in architectures.split()):
        return f"the native library was built for {architectures}, the GPU is {capability}"
    return ""


def _runs_on(capability: tuple[int, int], built: str) -> bool:
    """Machine code serves later minor versions of its major one, PTX everything later."""
    major, minor = (int(part.rstrip("af")) for part in built.removesuffix("+PTX").split("."))
    if built.endswith("+PTX") and (major, minor) <= capability:
        return True
    return major == capability[0] and minor <= capability[1]


@functools.cache
def _no_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "" if interpreted() else _no_gpu()


def build_info() -> str:
    """What the native library holds, as "cpu: avx512; cuda: 8.0 9.0"; it must be usable."""
    return str(torch.ops.vfmk_native.build_info())


def interpreted() -> bool:
    """Whether Triton kernels run under its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def native(
    operator: str, not_supported: Callable[..., str], names: tuple[str, ...] = BOTH
) -> Implementation:
    """The C++/CUDA implementation in the native library."""

    def load() -> dict[str, Callable[..., Any]]:
        namespace = torch.ops.vfmk_native
        # The ops' own functions, without the Python around them.
        return {name: getattr(namespace, f"{operator}_{name}").default._op for name in names}

    return Implementation(not_supported, load)


def module(
    name: str,
    not_supported: Callable[..., str],
    names: tuple[str, ...] = BOTH,
    adapters: Mapping[str, Callable[..., Any]] | None = None,
) -> Implementation:
    """An implementation in a Python module with functions `names`; one that has an adapter is
    called by that, as its first argument."""

    def load() -> dict[str, Callable[..., Any]]:
        implementation = importlib.import_module(name)
        kernels = {kernel: without_autocast(getattr(implementation, kernel)) for kernel in names}
        return kernels | {
            kernel: functools.partial(adapter, kernels[kernel])
            for kernel, adapter in (adapters or {}).items()
        }

    return Implementation(not_supported, load)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The operator has cast its arguments; inside, sums in fp32 must stay in fp32."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args)

    return run
