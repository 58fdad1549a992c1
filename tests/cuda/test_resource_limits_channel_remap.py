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


def test_vectors_are_16_bytes(built: Callable[..., Path]) -> None:
    """Every kernel that works on vectors reads and writes 16 bytes at once."""
    compiler = nvcc()

    def make(output: Path) -> None:
        command = [compiler, "-std=c++17", "-O3", "-arch=sm_80", "-ptx", SOURCE, "-o", output]
        process = subprocess.run(command, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr

    entries = built("channel_remap.ptx", make).read_text().split(".entry ")[1:]
    names = r"\d+((?:forward|backward)_(?:planes|pixels)_kernel)I(?:f|\d+\w+)Li[48]E"
    vectors = [(match[1], entry) for entry in entries if (match := re.search(names, entry))]
    assert len(vectors) == 4 * 3  # each in float, half and bfloat16
    for name, entry in vectors:
        assert re.search(r"ld\.global(?:\.nc)?\.v4\.[buf]32", entry), name
        assert re.search(r"st\.global\.v4\.[buf]32", entry), name
