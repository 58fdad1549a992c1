"""Limits on what nvcc makes of channel_remap's CUDA source, as test_resource_limits.py has them."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cuda.test_resource_limits import ARCHITECTURES, ROOT, nvcc

SOURCE = ROOT / "csrc" / "cuda" / "channel_remap.cu"
# Registers of a thread, over all architectures: a copy lives from many bytes in flight. Of 65,536,
# 128 leave 4 blocks of 128 threads, each with 8 KB under way. From sm_100 on nvcc has a thread's 32
# element loads under way at once, addresses and all: 162 registers, 3 blocks (80 on the others).
REGISTERS = {
    "forward_planes_kernel": 64,
    "forward_pixels_kernel": 168,
    "backward_planes_kernel": 128,
    "backward_pixels_kernel": 128,
    "inverse_kernel": 64,
    "sum_kernel": 64,
}
KERNELS = 4 * 3 * 2 + 1 + 3  # four for each dtype in vectors and elements; the rest


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_stack_and_spills(built: Callable[..., Path], architecture: int) -> None:
    compiler = nvcc()

    def make(output: Path) -> None:
        command = [compiler, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin"]
        process = subprocess.run(
            [*command, "-Xptxas", "-v", SOURCE, "-o", output], capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
        output.with_suffix(".txt").write_text(process.stderr)

    report = built(f"channel_remap_{architecture}.cubin", make).with_suffix(".txt").read_text()
    pattern = re.compile(
        r"Function properties for \S*?\d+([a-z_]+_kernel)\S*\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers"
    )
    found = pattern.findall(report)
    assert len(found) == KERNELS
    for name, *memory, registers in found:
        assert {int(size) for size in memory} == {0}, f"{name} uses local memory"
        assert int(registers) <= REGISTERS[name], name
