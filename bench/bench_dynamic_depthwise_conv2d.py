"""dynamic_depthwise_conv2d against what PyTorch users write today.

Limits for N = B·C·H·W elements of s bytes: forward 2Ns + BCk²s bytes and 2k²N FLOP; backward, if
fused, 3Ns + 2BCk²s bytes and 4k²N FLOP.
"""

import functools

import pytest
import torch
from torch import Tensor

import vfmk
from bench.harness import Case, measure
from tests.ops.test_dynamic_depthwise_conv2d import eager as groups_trick

CPU_SIZES = [(4, 64, 64, 64), (1, 32, 64, 64)]
CUDA_SIZES = [(8, 256, 256, 256), (1, 32, 64, 64), (4, 64, 64, 64)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def shift_and_add(input: Tensor, weight: Tensor) -> Tensor:
    """In the input's own dtype, as one would write it."""
    kernel_size = weight.shape[-1]
    height, width = input.shape[2:]
    padded = torch.nn.functional.pad(input, (kernel_size // 2,) * 4)
    return sum(
        weight[:, :, i, j, None, None] * padded[:, :, i : i + height, j : j + width]
        for i in range(kernel_size)
        for j in range(kernel_size)
    )


def on_backend(name: str):
    def run(input: Tensor, weight: Tensor) -> Tensor:
        with vfmk.use_backend(name):
            return vfmk.ops.dynamic_depthwise_conv2d(input, weight)

    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cuda = metafunc.config.getoption("device") == "cuda"
    smoke = metafunc.config.getoption("smoke")
    sizes = [(2, 8, 9, 10)] if smoke else CUDA_SIZES if cuda else CPU_SIZES
    metafunc.parametrize("size", sizes, ids=lambda size: "x".join(map(str, size)))
    metafunc.parametrize("dtype", [torch.bfloat16] if cuda else [torch.float32], ids=str)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def bench_dynamic_depthwise_conv2d(
    benchmark, device, smoke, size, dtype, layout, kernel_size, direction
):
    batch, channels, height, width = size
    elements = batch * channels * height * width
    weights = batch * channels * kernel_size**2
    itemsize = torch.empty((), dtype=dtype).element_size()
    forward_bytes = (2 * elements + weights) * itemsize
    backward_bytes = (3 * elements + 2 * weights) * itemsize
    forward_flop = 2 * kernel_size**2 * elements
    by_direction = {
        "forward": (forward_bytes, forward_flop),
        "backward": (backward_bytes, 2 * forward_flop),
        "both": (forward_bytes + backward_bytes, 3 * forward_flop),
    }

    def inputs() -> tuple[Tensor, Tensor]:
        random = functools.partial(torch.randn, device=device, dtype=dtype)
        input = random(size).to(memory_format=getattr(torch, layout))
        return input, random(batch, channels, kernel_size, kernel_size)

    contenders = {"vfmk": lambda x, w: vfmk.ops.dynamic_depthwise_conv2d(x, w)}
    if device == "cuda":
        contenders["vfmk triton"] = on_backend("triton")
    contenders |= {"groups": groups_trick, "shift-and-add": shift_and_add}
    if not smoke:
        torch._dynamo.reset()  # else a limit on recompilation makes it eager in the end
        contenders["shift-and-add compiled"] = torch.compile(shift_and_add, dynamic=False)
    case = Case(
        contenders,
        vfmk.reference.dynamic_depthwise_conv2d,
        inputs,
        direction,
        *by_direction[direction],
        TOLERANCE[dtype],
    )
    benchmark.group = f"dynamic_depthwise_conv2d {size} k={kernel_size} {layout} {dtype}"
    measure(benchmark, case, rounds=3 if smoke else 30)
