"""Limits on what ptxas makes of layer_norm_2d's Triton kernels, without a GPU.

A spill, or registers past a limit, means fewer warps to hide memory latency with: raise a limit
only with a measurement on a GPU beside it.
"""

import os

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.aot import CAPABILITIES, Launch, compiled, recorded
from vfmk.kernels import layer_norm_2d

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Registers of a thread, at most, over architectures and dtypes, in Triton 3.9. A multiprocessor has
# 65,536: for 4 programs of 128 threads with up to 128 each.
REGISTERS = {"_forward": 128, "_backward": 168}


def launches(layout: str, dtype: torch.dtype) -> dict[str, Launch]:
    """By kernel, those of a mapped forward and its whole backward."""
    input = torch.empty((8, 256, 64, 64), dtype=dtype, device="meta")
    input = input.to(memory_format=LAYOUTS[layout])
    weight = torch.empty(256, dtype=dtype, device="meta")
    index = torch.empty(256, dtype=torch.int64, device="meta")
    mean = torch.empty((8, 64, 64), device="meta")
    last = layout == "channels_last"
    with recorded() as found:
        layer_norm_2d.forward(input, weight, weight, index, 1e-6, last, input, mean, mean)
        layer_norm_2d.backward(input, input, weight, index, mean, mean, last, input, weight, weight)
    return {launch.kernel.fn.__name__: launch for launch in found}


@pytest.mark.parametrize("capability", [min(CAPABILITIES), 90])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", REGISTERS)
def test_resources(kernel, layout, capability):
    dtypes = (torch.bfloat16, torch.float32) if capability == 90 else (torch.bfloat16,)
    for dtype in dtypes:
        code = compiled(launches(layout, dtype)[kernel], capability)
        assert code.stack == 0, f"{dtype} spills"
        assert code.registers <= REGISTERS[kernel], dtype
        assert code.shared <= 8192, dtype


def test_instructions():
    """16-byte accesses in both layouts; what channels-last gathers, element by element."""
    for layout in LAYOUTS:
        instructions = compiled(launches(layout, torch.bfloat16)["_forward"], 90).instructions()
        assert instructions["STG.E.128"]
        assert any(opcode.startswith("LDG.E.128") for opcode in instructions)
