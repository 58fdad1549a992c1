"""dynamic_conv2d against what PyTorch users write today.

Limits for N = H·W pixels of B samples, elements of s bytes and K = k²CO: forward ((C + O)N + K)Bs
bytes and 2KNB FLOP; backward, if fused, ((2C + O)N + 2K)Bs bytes and 4KNB FLOP.
"""

import functools

import pytest
import torch
from torch import Tensor

import vfmk
from bench.harness import Case, measure
from tests.ops.test_dynamic_conv2d import eager as groups_trick

CASES = [  # size, k, layout; the adapter's own first
    ((4, 32, 64, 64), 3, "channels_last"),
    ((1, 32, 64, 64), 3, "channels_last"),
    ((4, 32, 32, 32), 3, "channels_last"),
    ((1, 32, 32, 32), 3, "channels_last"),
    ((4, 32, 64, 64), 3, "contiguous_format"),
    ((4, 32, 64, 64), 5, "channels_last"),
    ((4, 64, 64, 64), 3, "channels_last"),
]
SMOKE_CASES = [((2, 8, 9, 10), 3, "contiguous_format"), ((2, 8, 9, 10), 3, "channels_last")]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def unfold(input: Tensor, weight: Tensor) -> Tensor:
    """A matrix product for each sample, with every pixel's neighbourhood copied out."""
    height, width = input.shape[2:]
    kernel_size = weight.shape[-1]
    columns = torch.nn.functional.unfold(input, kernel_size, padding=kernel_size // 2)
    return torch.bmm(weight.flatten(2), columns).unflatten(2, (height, width))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cuda = metafunc.config.getoption("device") == "cuda"
    cases = SMOKE_CASES if metafunc.config.getoption("smoke") else CASES
    cases = [(*case, torch.bfloat16 if cuda else torch.float32) for case in cases]
    if not cuda:
        cases.append((*cases[0][:3], torch.bfloat16))
    ids = [f"{'x'.join(map(str, size))}-{k}-{layout}-{dtype}" for size, k, layout, dtype in cases]
    metafunc.parametrize(("size", "kernel_size", "layout", "dtype"), cases, ids=ids)


@pytest.mark.parametrize("direction", ["forward", "both"])
def bench_dynamic_conv2d(benchmark, device, smoke, size, dtype, layout, kernel_size, direction):
    """As many output as input channels, as the adapter has."""
    batch, channels, height, width = size
    activations = batch * channels * height * width
    weights = batch * channels**2 * kernel_size**2
    itemsize = torch.empty((), dtype=dtype).element_size()
    forward_bytes = (2 * activations + weights) * itemsize
    backward_bytes = (3 * activations + 2 * weights) * itemsize
    forward_flop = 2 * weights * height * width
    by_direction = {
        "forward": (forward_bytes, forward_flop),
        "both": (forward_bytes + backward_bytes, 3 * forward_flop),
    }

    def inputs() -> tuple[Tensor, Tensor]:
        random = functools.partial(torch.randn, device=device, dtype=dtype)
        input = random(size).to(memory_format=getattr(torch, layout))
        return input, random(batch, channels, channels, kernel_size, kernel_size)

    contenders = {
        "vfmk": lambda x, w: vfmk.ops.dynamic_conv2d(x, w),
        "groups": groups_trick,
        "unfold": unfold,
    }
    if not smoke:
        torch._dynamo.reset()  # else a limit on recompilation makes it eager in the end
        contenders["unfold compiled"] = torch.compile(unfold, dynamic=False)
    case = Case(
        contenders,
        vfmk.reference.dynamic_conv2d,
        inputs,
        direction,
        *by_direction[direction],
        TOLERANCE[dtype],
    )
    benchmark.group = f"dynamic_conv2d {size} k={kernel_size} {layout} {dtype}"
    measure(benchmark, case, rounds=3 if smoke else 15)
