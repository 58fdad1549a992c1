"""Limits on what nvcc makes of the CUDA sources, on every architecture, without a GPU.

A spill, or registers past a limit, means fewer warps to hide memory latency with: raise a limit
only with a measurement on a GPU beside it.
"""

import functools
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "dynamic_depthwise_conv2d.cu"
ARCHITECTURES = (90, 80, 86, 89, 100, 120)
BYTES = {"__nv_bfloat16": 2, "__half": 2, "float": 4}

# Registers of a thread, over all architectures, for k = 3, 5, 7. A multiprocessor has 65,536: at 80
# it holds 6 blocks of 128 threads, at 96 5, at 128 4. Shared memory (37 KB, channels-last 56 KB)
# allows 6 and 4. Keys: bytes of an element, backward, channels_last.
REGISTERS = {
    (2, False, False): (72, 80, 88),
    (2, False, True): (104, 104, 104),
    (2, True, False): (80, 104, 112),
    (2, True, True): (112, 128, 128),
    (4, False, False): (96, 112, 128),
    (4, False, True): (64, 80, 120),
    (4, True, False): (96, 120, 128),
    (4, True, True): (96, 128, 128),
}
REGISTERS_OTHER = 64  # of the plain kernels and of the sums


@dataclass(frozen=True)
class Kernel:
    name: str
    dtype: str
    side: int = 0
    backward: bool = False
    channels_last: bool = False

    @classmethod
    def of(cls, mangled: str) -> "Kernel":
        types = {"13__nv_bfloat16": "__nv_bfloat16", "6__half": "__half", "f": "float"}
        match = re.search(
            r"\d([a-z_]+_kernel)I(13__nv_bfloat16|6__half|f)(?:Li(\d)ELb(\d)ELb(\d)E)?E", mangled
        )
        assert match, mangled
        name, dtype, side, backward, channels_last = match.groups(default="0")
        return cls(name, types[dtype], int(side), backward == "1", channels_last == "1")


@dataclass(frozen=True)
class Usage:
    registers: int
    stack: int
    spills: int
    shared: int


def nvcc() -> Path:
    """$CUDA_HOME, the conventional folder, then PATH, whose nvcc may wrap one elsewhere."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path).resolve())
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    pytest.skip("no nvcc in $CUDA_HOME, /usr/local/cuda or PATH")


@pytest.fixture(scope="session")
def cubin(built: Callable[..., Path]) -> Callable[[int], Path]:
    """The machine code for an architecture; what ptxas says of it lies beside, in .txt."""
    compiler = nvcc()

    def make(architecture: int, output: Path) -> None:
        command = [compiler, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin"]
        process = subprocess.run(
            [*command, "-Xptxas", "-v", SOURCE, "-o", output], capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
        output.with_suffix(".txt").write_text(process.stderr)

    return lambda architecture: built(
        f"sm_{architecture}.cubin", functools.partial(make, architecture)
    )


def usage(report: str) -> dict[Kernel, Usage]:
    pattern = re.compile(
        r"Function properties for (\S+)\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers([^\n]*)"
    )
    found = {}
    for mangled, stack, stores, loads, registers, rest in pattern.findall(report):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[Kernel.of(mangled)] = Usage(
            int(registers), int(stack), int(stores) + int(loads), int(shared[1]) if shared else 0
        )
    return found


def test_registers_stack_and_shared_memory(cubin: Callable[[int], Path]) -> None:
    with ThreadPoolExecutor(2) as pool:
        cubins = list(pool.map(cubin, ARCHITECTURES))
    broken = []
    for architecture, path in zip(ARCHITECTURES, cubins, strict=True):
        kernels = usage(path.with_suffix(".txt").read_text())
        names = Counter(kernel.name for kernel in kernels)
        assert names == {
            "tile_kernel": 36, "sum_kernel": 3, "plain_kernel": 3, "plain_weight_kernel": 3
        }  # fmt: skip
        for kernel, used in kernels.items():
            limit = REGISTERS_OTHER
            if kernel.name == "tile_kernel":
                key = (BYTES[kernel.dtype], kernel.backward, kernel.channels_last)
                limit = dict(zip((3, 5, 7), REGISTERS[key], strict=True))[kernel.side]
            if used.spills or used.stack or used.registers > limit or used.shared > 16:
                broken.append(f"sm_{architecture} {kernel}: {used}, {limit} registers allowed")
    assert not broken, "\n".join(broken)


@pytest.fixture(scope="session")
def instructions(cubin: Callable[[int], Path]) -> dict[Kernel, Counter[str]]:
    """How often each opcode stands in the code of each kernel, on sm_90."""
    places = [nvcc().parent]
    try:
        import triton

        places.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    except ImportError:
        pass
    tools = [place / "cuobjdump" for place in places if (place / "cuobjdump").is_file()]
    if not tools:
        pytest.skip("no cuobjdump beside nvcc or in triton")
    listing = subprocess.run(
        [tools[0], "-sass", cubin(90)], check=True, capture_output=True, text=True
    ).stdout
    counts = {}
    for section in re.split(r"\n\s+Function : ", listing)[1:]:
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]\s+)?([A-Z][A-Z0-9_.]*)", section)
        counts[Kernel.of(section.split("\n", 1)[0])] = Counter(opcodes)
    return counts


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", list(BYTES))
def test_instructions(
    instructions: dict[Kernel, Counter[str]], dtype: str, backward: bool, channels_last: bool
) -> None:
    """Device memory in 16-byte accesses, or copied to shared memory without passing registers; half
    precision on the tensor cores, fed by the matrix loads; no local memory."""
    if channels_last:
        expected = {"LDG.E.128", "STG.E.128"}
    else:
        expected = {"LDGSTS.E.BYPASS.128" if dtype == "float" else "LDGSTS.E.64", "STG.E.128"}
        if backward:
            expected.add("LDGSTS.E.BYPASS.128")
    if dtype == "float":
        expected |= {"FFMA", "LDS.128"}
    else:
        expected.add("HMMA.16816.F32.BF16" if dtype == "__nv_bfloat16" else "HMMA.16816.F32")
        expected |= {"LDSM.16.M88.2", "LDSM.16.MT88.2"} if backward else {"LDSM.16.M88.2"}
    for side in (3, 5, 7):
        found = instructions[Kernel("tile_kernel", dtype, side, backward, channels_last)]
        assert expected <= set(found), expected - set(found)
        assert not {opcode for opcode in found if opcode.startswith(("LDL", "STL"))}
