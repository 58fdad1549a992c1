"""Limits on what ptxas makes of every Triton kernel, on every architecture, without a GPU.

A spill, or registers past a limit, means fewer warps to hide memory latency with: raise a limit
only with a measurement on a GPU beside it.
"""

import pytest
import torch

from tests.kernels.aot import CAPABILITIES, Launch, compiled, count, recorded
from vfmk.kernels import channel_remap, dynamic_depthwise_conv2d, mask_iou

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
    assert count(instructions, f"LDG.E.{width}") >= rows * of_a_row[0] + taps
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


# A copy needs many bytes in flight: 8 programs of 128 threads at 64 registers, 4 at 128.
REMAP_REGISTERS = {"forward": 64, "backward": 128}


def channel_remap_launches(direction: str, layout: str, dtype: torch.dtype) -> list[Launch]:
    input = torch.empty((8, 256, 64, 64), dtype=dtype, device="meta")
    input = input.to(memory_format=LAYOUTS[layout]).flatten(2)[:, :, None]
    index = torch.empty((1, 256), dtype=torch.int64, device="meta")
    scale = torch.empty((1, 256), dtype=dtype, device="meta")
    last = layout == "channels_last"
    with recorded() as launches:
        if direction == "forward":
            channel_remap.forward(input, index, scale, last, torch.empty_like(input))
        else:
            grads = (torch.empty_like(input), torch.empty_like(scale))
            channel_remap.backward(input, input, index, scale, 256, last, *grads)
    return launches


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", REMAP_REGISTERS)
def test_channel_remap_resources(direction, layout, capability):
    launches = channel_remap_launches(direction, layout, torch.bfloat16)
    assert len(launches) == (1 if direction == "forward" else 2)
    for launch in launches:
        code = compiled(launch, capability)
        assert code.stack == 0, launch.kernel
        assert code.registers <= REMAP_REGISTERS[direction], launch.kernel
        assert code.shared <= 8192, launch.kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_channel_remap_instructions(dtype):
    """NCHW in 16-byte accesses; channels-last writes so, and gathers element by element."""
    for layout in LAYOUTS:
        (launch,) = channel_remap_launches("forward", layout, dtype)
        instructions = compiled(launch, 90).instructions()
        assert instructions["STG.E.128"]
        if layout == "nchw":
            assert count(instructions, "LDG.E.128")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_mask_iou_resources(capability):
    logits = torch.empty((64, 256, 256), dtype=torch.bfloat16, device="meta")
    target = torch.empty((600, 800), dtype=torch.bool, device="meta")
    with recorded() as launches:
        mask_iou.forward(logits, target, (768, 1024), 1024, 0.0, torch.empty(64, device="meta"))
    (launch,) = launches
    code = compiled(launch, capability)
    assert code.stack == 0
    assert code.registers <= 168  # 3 programs of 128 threads
    assert code.shared <= 8192
