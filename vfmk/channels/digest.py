"""Which model, score and samples a file of scores is of.

Values, tensors, arrays, containers and objects count by all that they hold. A function counts by
its code, its defaults and the variables outside it that it reads; a module by its parameters,
buffers, plain attributes and the code of its class. But of functions and classes that do not stand
in the same Python module as the one given, above all those of libraries, only the name counts; of
functions made within others, which have none, the code and what they close over.
"""

import dis
import functools
import hashlib
from collections.abc import Iterator, Sequence
from enum import Enum
from os import PathLike, fspath
from types import CodeType, EllipsisType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Told apart by their repr.
VALUES = str | bytes | int | float | complex | Enum | range | EllipsisType | None
VALUES |= torch.device | torch.dtype
OF_MODULE = frozenset(vars(nn.Module()))  # attributes that every module has


def digest_of_sam(sam: nn.Module) -> str:
    """SHA-256 of its modules, as `digest_of`, but of their code the names alone."""
    return _Digest(None).of(sam, "model")


def digest_of(value: Any, name: str) -> str:
    """SHA-256 of a function, a module, or an object that is called as one is.

    Raises:
        ValueError: naming what cannot be told apart from others of its type, by `name`.
    """
    return _Digest(_python_module_of(value)).of(value, name)


def digest_of_samples(samples: Sequence[Any]) -> str:
    """SHA-256 of all that they hold. Raises as `digest_of`."""
    digest = hashlib.sha256()
    for number, sample in enumerate(samples):
        digest.update(_Digest(None).of(sample, f"sample {number}").encode())
    return digest.hexdigest()


def modules_of(model: Any) -> list[nn.Module]:
    """The model's, and those of the adapters in force, which a Sam does not own."""
    if not isinstance(model, nn.Module):
        return []
    stacks = {stack for module in model.modules() for stack in vars(module).get("_adapters", ())}
    return [*model.modules(), *(module for stack in stacks for module in stack.modules())]


def _python_module_of(value: Any) -> str:
    value = _unwrapped(value)
    if isinstance(value, functools.partial):
        return _python_module_of(value.func)
    named = value if isinstance(value, FunctionType | MethodType) else type(value)
    return named.__module__


def _unwrapped(value: Any) -> Any:
    """What `torch.compile` was given."""
    return getattr(value, "_torchdynamo_orig_callable", value)


class _Digest:
    """Of one value. Code counts that stands in the Python module `own`."""

    def __init__(self, own: str | None) -> None:
        self.own = own
        self.open: list[int] = []  # the objects around the one at hand

    def of(self, value: Any, place: str) -> str:
        digest = hashlib.sha256()
        for part in self._parts(value, place):
            digest.update(f"{len(part)}:".encode())
            digest.update(part)
        return digest.hexdigest()

    def _parts(self, value: Any, place: str) -> Iterator[Any]:
        """Bytes that say all of `value`; `place` is where it is, for an error."""
        value = _unwrapped(value)
        yield type(value).__qualname__.encode()
        if id(value) in self.open:
            yield str(self.open.index(id(value))).encode()
            return
        self.open.append(id(value))
        if isinstance(value, VALUES):
            yield repr(value).encode()
        elif isinstance(value, Tensor):
            yield f"{value.dtype}{list(value.shape)}".encode()
            yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        elif isinstance(value, PathLike):
            yield repr(fspath(value)).encode()
        elif isinstance(value, set | frozenset):
            yield "".join(sorted(_Digest(self.own).of(item, place) for item in value)).encode()
        elif isinstance(value, list | tuple):
            yield str(len(value)).encode()
            for number, item in enumerate(value):
                yield from self._parts(item, f"{place}[{number}]")
        elif isinstance(value, dict):
            yield from self._named(value, place, "{place}[{name!r}]")
        elif isinstance(value, type):
            yield from self._class(value, place)
        elif isinstance(value, nn.Module):
            yield from self._module(value, place)
        elif isinstance(value, FunctionType):
            yield from self._function(value, place)
        elif isinstance(value, CodeType):
            yield from self._code(value, place)
        elif isinstance(value, MethodType):
            yield from self._parts([value.__func__, value.__self__], place)
        elif isinstance(value, functools.partial):
            yield from self._parts([value.func, value.args, value.keywords], place)
        elif isinstance(value, ModuleType) or (callable(value) and hasattr(value, "__name__")):
            yield _name_of(value).encode()
        elif hasattr(value, "tobytes") and not _has_objects(value):
            form = [getattr(value, name, None) for name in ("dtype", "shape", "mode", "size")]
            yield repr(form).encode()  # of an array or a PIL image
            yield value.tobytes()
        else:
            yield from self._class(type(value), place)
            yield from self._named(_attributes(value, place), place, "{place}.{name}")
        self.open.pop()

    def _named(self, values: dict[Any, Any], place: str, form: str) -> Iterator[Any]:
        yield str(len(values)).encode()
        for name, value in values.items():
            yield from self._parts(name, f"a key of {place}")
            yield from self._parts(value, form.format(place=place, name=name))

    def _module(self, model: nn.Module, place: str) -> Iterator[Any]:
        for module in modules_of(model):
            yield from self._class(type(module), place)
            yield module.extra_repr().encode()
            yield from self._parts(list(module.named_parameters(recurse=False)), place)
            yield from self._parts(list(module.named_buffers(recurse=False)), place)
            own = {k: v for k, v in vars(module).items() if k not in OF_MODULE and _is_plain(v)}
            yield from self._named(own, place, "{place}.{name}")

    def _class(self, kind: type, place: str) -> Iterator[Any]:
        """Its name, and the code of its methods and properties."""
        yield _name_of(kind).encode()
        for base in kind.__mro__:
            if base.__module__ != self.own:
                continue
            yield _name_of(base).encode()
            for name, member in vars(base).items():
                function = getattr(member, "__func__", getattr(member, "fget", member))
                if isinstance(function, FunctionType):
                    yield from self._parts(function, f"{place}.{name}")

    def _function(self, function: FunctionType, place: str) -> Iterator[Any]:
        is_own = function.__module__ == self.own
        if not is_own and "<" not in function.__qualname__:  # not within a function, no <lambda>
            yield _name_of(function).encode()
            return
        code = function.__code__
        yield from self._code(code, place)
        yield from self._parts([function.__defaults__, function.__kwdefaults__], place)
        around = {}
        if is_own:
            names = sorted(_globals_read(code) & function.__globals__.keys())
            around = {name: function.__globals__[name] for name in names}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                around[name] = cell.cell_contents
            except ValueError:  # not yet assigned
                around[name] = None
        yield from self._named(around, place, "the variable {name!r} of {place}")

    def _code(self, code: CodeType, place: str) -> Iterator[Any]:
        yield code.co_code
        yield from self._parts([code.co_names, code.co_consts], place)


def _globals_read(code: CodeType) -> set[str]:
    """By the code and the functions defined in it."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    inner = (_globals_read(const) for const in code.co_consts if isinstance(const, CodeType))
    return names.union(*inner)


def _name_of(value: Any) -> str:
    name = getattr(value, "__qualname__", value.__name__)
    return f"{getattr(value, '__module__', None)}.{name}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    is_plain = isinstance(value, VALUES | Tensor | np.ndarray | FunctionType)
    return is_plain and not isinstance(value, nn.Parameter)


def _has_objects(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.hasobject


def _attributes(value: Any, place: str) -> dict[str, Any]:
    declared = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    slots = [s for names in declared for s in ([names] if isinstance(names, str) else names)]
    slots = [slot for slot in slots if not slot.startswith("__")]
    if not (hasattr(value, "__dict__") or slots):
        raise ValueError(
            f"search: with an output, runs must be told apart, but {place} is a"
            f" {type(value).__qualname__}, of which nothing can be said: give values, tensors,"
            " arrays, functions, modules and containers of them"
        )
    named = {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
    return named | getattr(value, "__dict__", {})
