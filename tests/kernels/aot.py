"""What ptxas makes of a Triton launch, without a GPU.

`recorded()` catches the launches that an operator would make for given arguments, which may be meta
tensors of any size; `compiled()` builds one of them for a compute capability, exactly as a launch
there would: the same types, constants, alignments and options. A test module that imports this is
skipped where there is no Triton, or its interpreter instead.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

CAPABILITIES = (80, 86, 89, 90, 100, 120)

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Code:
    registers: int  # of a thread
    stack: int  # bytes of a thread; spilled registers live here
    shared: int  # bytes of a program
    cubin: bytes = field(repr=False)

    def instructions(self) -> Counter[str]:
        """Instructions by opcode, as "LDG.E.128"."""
        assembly = _inspect(self.cubin, triton.knobs.nvidia.nvdisasm.path, "-c")
        opcode = r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)"
        return Counter(re.findall(opcode, assembly, re.MULTILINE))


def count(instructions: Counter[str], *prefixes: str) -> int:
    """Instructions whose opcode begins so."""
    return sum(number for opcode, number in instructions.items() if opcode.startswith(prefixes))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside the block are listed instead of made."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        arguments |= {name: value for name, value in kwargs.items() if name not in options}
        launches.append(Launch(kernel, arguments, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        yield launches


def compiled(launch: Launch, capability: int) -> Code:
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def kind(value: Any, by_value: bool, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(item, by_value, (*path, i)) for i, item in enumerate(value))
        name, aligned = _specialized(value, by_value)
        if name == "constexpr":
            constants[path] = value
        elif aligned:
            attributes[path] = [["tt.divisibility", 16]]
        return name

    signature = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[index,] = value
        else:
            signature[parameter.name] = kind(value, not parameter.do_not_specialize, (index,))
    source = ASTSource(launch.kernel, signature, constants, attributes)
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        target = GPUTarget("cuda", capability, 32)
        kernel = triton.compile(source, target=target, options=launch.options)
        cubin = kernel.asm["cubin"]
    usage = _inspect(cubin, triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Code(registers, stack, kernel.metadata.shared, cubin)


def _specialized(value: Any, by_value: bool) -> tuple[str, bool]:
    """The type that a launch compiles for, and whether it may rely on 16 dividing the value."""
    if isinstance(value, torch.Tensor):
        offset = value.storage_offset() * value.element_size()
        return "*" + _TYPES[value.dtype], offset % 16 == 0
    if isinstance(value, TensorDescriptor):
        block = ",".join(map(str, value.block_shape))
        return f"tensordesc<{_TYPES[value.base.dtype]}[{block}]>", False
    if value is None or isinstance(value, str) or (by_value and value == 1):
        return "constexpr", False
    if isinstance(value, float):
        return "fp32", False
    return "i32" if abs(value) < 2**31 else "i64", by_value and value % 16 == 0


def _inspect(cubin: bytes, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
