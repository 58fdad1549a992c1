"""Limits on what ptxas makes of rel_pos_attention's Triton kernels, without a GPU.

A spill, registers or shared memory past a limit, or matrix products that wait for one another, and
fewer programs hide each other's latency: raise a limit only with a measurement on a GPU beside it.
"""

import pytest
import torch

from tests.kernels.aot import CAPABILITIES, Launch, compiled, count, recorded
from vfmk.kernels import _rel_pos_plan
from vfmk.kernels import rel_pos_attention as kernels

# Grid, window and head width: the blocks of ViT-B and ViT-L, and a global one of ViT-H.
CASES = {
    "global": ((64, 64), (64, 64), 64),
    "global, wide": ((64, 64), (64, 64), 80),
    "windows": ((64, 64), (14, 14), 64),
}
KERNELS = ("_forward", "backward_keys", "backward_queries")
# Registers of a thread, which are handed out by eights, and KiB of shared memory of a program, at
# most: in the order of KERNELS, for the tensor cores of sm_90, of sm_100, and of all others.
REGISTERS = {
    90: {"global": (128, 208, 224), "global, wide": (144, 232, 232), "windows": (168, 192, 160)},
    100: {"global": (144, 120, 200), "global, wide": (144, 128, 216), "windows": (160, 128, 168)},
    0: {"global": (192, 184, 216), "global, wide": (184, 168, 240), "windows": (192, 255, 216)},
}
SHARED = {
    90: {"global": (65, 57, 49), "global, wide": (51, 69, 61), "windows": (41, 34, 33)},
    100: {"global": (66, 73, 57), "global, wide": (41, 69, 51), "windows": (42, 43, 38)},
    0: {"global": (48, 29, 25), "global, wide": (20, 28, 31), "windows": (50, 26, 25)},
}
MATRIX_PRODUCT = {90: "HGMMA", 100: "UTCHMMA", 0: "HMMA.16816"}
MOST_SHARED = 99 * 1024  # all that a program has on sm_86, sm_89 and sm_120


def launches(case: str, capability: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Launch]:
    """By kernel, those of one forward and one whole backward."""
    grid_size, window_size, head_width = CASES[case]
    heads, batch = 12, 8

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens = (batch, *grid_size)
    qkv = empty(*tokens, 3, heads, head_width).unbind(3)
    relative = empty(*tokens, heads, 2 * sum(window_size) - 2)
    pads = (None, None) if window_size == grid_size else (empty(heads, head_width),) * 2
    output = empty(*tokens, heads, head_width)
    log_sum_exp = empty(batch, heads, *grid_size, dtype=torch.float32)
    geometry = (window_size, head_width**-0.5)
    arguments = (*qkv, relative, *pads)
    with pytest.MonkeyPatch.context() as patch, recorded() as found:
        patch.setattr(_rel_pos_plan, "capability", lambda device: divmod(capability, 10))
        kernels.forward(*arguments, *geometry, output, log_sum_exp)
        kernels.backward(output, *arguments, output, log_sum_exp, *geometry, *arguments)
    return {launch.kernel.fn.__name__: launch for launch in found}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_resources(case, kernel, capability):
    code = compiled(launches(case, capability)[kernel], capability)
    cores = capability if capability in REGISTERS else 0
    assert code.stack == 0, "spills"
    assert code.registers <= REGISTERS[cores][case][KERNELS.index(kernel)]
    assert code.shared <= 1024 * SHARED[cores][case][KERNELS.index(kernel)] <= MOST_SHARED
    instructions = code.instructions()
    products = count(instructions, MATRIX_PRODUCT[cores])
    assert products, "no tensor cores"
    if cores == 90:
        # ptxas makes each wait for the one before, should it not see through the pipeline.
        waits = count(instructions, "WARPGROUP.DEPBAR")
        assert waits <= products // 2, "matrix products are serialised"
    if cores in (90, 100):  # the padded tokens of windows have no place in a descriptor
        fetches = count(instructions, "UTMALDG")
        assert bool(fetches) == (case != "windows" or kernel == "backward_keys")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", KERNELS)
def test_resources_of_float32(kernel, capability):
    code = compiled(launches("global", capability, torch.float32)[kernel], capability)
    assert code.stack == 0, "spills"
    assert code.shared <= MOST_SHARED


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["backward_prepare", "backward_relative"])
def test_resources_around_backward(kernel, capability):
    code = compiled(launches("windows", capability)[kernel], capability)
    assert code.stack == 0, "spills"
    assert code.registers <= 80
    assert code.shared <= 4096
