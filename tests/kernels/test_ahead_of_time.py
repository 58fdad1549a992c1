"""Limits on what ptxas makes of every Triton kernel, on every architecture, without a GPU.

A spill, or registers past a limit, means fewer warps to hide memory latency with: raise a limit
only with a measurement on a GPU beside it.
"""

import os

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.aot import CAPABILITIES, Launch, compiled, recorded
from vfmk.kernels import dynamic_depthwise_conv2d

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Registers of a thread, at most, over architectures, dtypes and Triton 3.6 to 3.9. A multiprocessor
# has 65,536: for 4 programs of 128 threads with up to 128 each, 3 with 168, 2 with 255.
REGISTERS = {
    ("forward", "nchw", 3): 64,
    ("forward", "nchw", 5): 80,
    ("forward", "nchw", 7): 128,
    ("forward", "channels_last", 3): 160,
    ("forward", "channels_last", 5): 152,
    ("forward", "channels_last", 7): 232,
    ("backward", "nchw", 3): 104,
    ("backward", "nchw", 5): 136,
    ("backward", "nchw", 7): 255,
    ("backward", "channels_last", 3): 160,
    ("backward", "channels_last", 5): 168,
    ("backward", "channels_last", 7): 208,
}
# Bytes of a program: the tree that adds up grad_weight.
SHARED = {"forward": 0, "backward": 1024}
# What a thread loads and stores at once, in bf16: a strip's row, or its channels of a pixel.
VECTORS = {("nchw", 3): "128", ("nchw", 5): "128", ("channels_last", 3): "64"}


def depthwise_launch(
    direction: str, layout: str, side: int, dtype: torch.dtype, dilation: int = 1
) -> Launch:
    """As for a large batch; what depends on the size is not compiled in."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, channels = 8, 256
    input = empty(batch, channels, 256, 256).to(memory_format=LAYOUTS[layout])
    weight, bias = empty(batch, channels, side, side), empty(batch, channels)
    output = torch.empty_like(input)
    geometry = (dilation * (side // 2),) * 4, (dilation, dilation)
    with recorded() as launches:
        if direction == "forward":
            dynamic_depthwise_conv2d.forward(input, weight, bias, *geometry, output)
        else:
            gradients = (torch.empty_like(tensor) for tensor in (input, weight, bias))
            dynamic_depthwise_conv2d.backward(output, input, weight, *geometry, *gradients)
    (launch,) = launches
    return launch


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("direction", "layout", "side"), REGISTERS)
def test_dynamic_depthwise_conv2d_resources(direction, layout, side, capability):
    dtypes = (torch.bfloat16, torch.float32) if capability == 90 else (torch.bfloat16,)
    for dtype in dtypes:
        code = compiled(depthwise_launch(direction, layout, side, dtype), capability)
        assert code.stack == 0, f"{dtype} spills"
        assert code.registers <= REGISTERS[direction, layout, side], dtype
        assert code.shared <= SHARED[direction], dtype


@pytest.mark.parametrize(("layout", "side"), VECTORS)
def test_dynamic_depthwise_conv2d_instructions(layout, side):
    launch = depthwise_launch("forward", layout, side, torch.bfloat16)
    instructions = compiled(launch, 90).instructions()
    rows, columns = launch.arguments["ROWS"], launch.arguments["COLUMNS"]
    of_a_row = (1, 1) if layout == "nchw" else (columns + side - 1, columns)
    width = VECTORS[layout, side]
    taps = side**2 if layout == "channels_last" else 0
    loads = sum(n for opcode, n in instructions.items() if opcode.startswith(f"LDG.E.{width}"))
    assert loads >= rows * of_a_row[0] + taps
    assert instructions[f"STG.E.{width}"] == rows * of_a_row[1]
    outputs = rows * columns * (1 if layout == "nchw" else launch.arguments["VECTOR"])
    assert instructions["FFMA"] == outputs * side**2  # each tap once, nothing but multiply-adds


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", SHARED)
def test_dynamic_depthwise_conv2d_tiles(direction, layout):
    code = compiled(depthwise_launch(direction, layout, 3, torch.bfloat16, dilation=2), 90)
    assert code.stack == 0
    assert code.registers <= 128
    assert code.shared <= 1024
