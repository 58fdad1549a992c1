"""What ptxas makes of dynamic_conv2d's Triton kernels, on every architecture, without a GPU."""

import pytest
import torch

from tests.kernels.aot import CAPABILITIES, Launch, compiled, recorded
from vfmk.kernels import dynamic_conv2d

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
KERNELS = ("forward", "grad_weight")  # grad_input is forward's
# Registers of a thread, at most, in bf16 and fp32. A multiprocessor has 65,536: for 4 programs of
# 128 threads with up to 128 each, 3 with 168, 2 with 255.
REGISTERS = {
    ("forward", "nchw"): 192,
    ("forward", "channels_last"): 168,
    ("grad_weight", "nchw"): 168,
    ("grad_weight", "channels_last"): 128,
}
SHARED = 99 << 10  # bytes that every architecture from sm_80 on lends to a program


def launch(kernel: str, layout: str, dtype: torch.dtype, channels: int = 32) -> Launch:
    """As for the adapter: 8 samples of 64 x 64 tokens."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    image = empty(8, channels, 64, 64).to(memory_format=LAYOUTS[layout])
    weight, geometry = empty(8, channels, channels, 3, 3), ((1, 1, 1, 1), (1, 1))
    with recorded() as launches:
        if kernel == "forward":
            dynamic_conv2d.forward(image, weight, empty(8, channels), *geometry, image)
        else:
            dynamic_conv2d.backward(image, image, weight, *geometry, None, weight, None)
    (recorded_launch,) = launches
    return recorded_launch


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_resources_and_tensor_cores(kernel, layout, capability):
    code = compiled(launch(kernel, layout, torch.bfloat16), capability)
    assert code.stack == 0, "spills"
    assert code.registers <= REGISTERS[kernel, layout]
    assert code.shared <= SHARED
    if capability in (80, 90):
        instructions = " ".join(code.instructions())
        assert ("HGMMA" if capability == 90 else "HMMA") in instructions
        # In channels-last, tiles go to shared memory 16 bytes at a time, beside the products.
        assert layout == "nchw" or "LDGSTS.E.BYPASS" in instructions


@pytest.mark.parametrize("kernel", KERNELS)
def test_float32(kernel):
    """Three tf32 products for one, and no fp32 multiply-adds instead of them."""
    code = compiled(launch(kernel, "channels_last", torch.float32), 80)
    assert code.stack == 0
    assert code.registers <= REGISTERS[kernel, "channels_last"]
    assert code.shared <= SHARED
    instructions = code.instructions()
    assert sum(n for opcode, n in instructions.items() if "HMMA" in opcode) % 3 == 0
    assert not instructions["FFMA"]
