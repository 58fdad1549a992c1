"""Limits on what ptxas makes of attention_pool's Triton kernels, without a GPU.

A spill, or registers or shared memory past a limit, and fewer programs hide each other's latency:
raise a limit only with a measurement on a GPU beside it.
"""

import pytest
import torch

from tests.kernels.aot import CAPABILITIES, Launch, compiled, count, recorded
from vfmk.kernels import attention_pool

# Registers of a thread, at most, over architectures, in Triton 3.9, by kernel and number of
# queries (of width 64). A multiprocessor has 65,536: for 4 programs of 4 warps with 128 each.
REGISTERS = {
    ("_forward", 16): 128,
    ("_forward", 64): 168,
    ("_backward", 16): 168,
    ("_backward", 64): 255,
}
# Bytes of a program. One may have 99 KiB on sm_86, sm_89 and sm_120.
SHARED = 60 * 1024
# sm_90 multiplies in groups of 64 rows; 16 queries are fewer, but 64 tokens are not.
MATRIX_PRODUCT = {
    80: ("HMMA.16816",),
    86: ("HMMA.16816",),
    90: ("HMMA.16816", "HGMMA"),
    100: ("HMMA.16816", "UTCHMMA"),
}


def launches(queries: int, width: int, dtype: torch.dtype) -> dict[str, Launch]:
    """By kernel, those of one forward and one whole backward."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch = 8
    arguments = (empty(batch, 4096, width), empty(queries, width))
    output = empty(batch, queries, width)
    log_sum_exp = empty(batch, queries, dtype=torch.float32)
    with recorded() as found:
        attention_pool.forward(*arguments, 1.0, output, log_sum_exp)
        attention_pool.backward(output, *arguments, output, log_sum_exp, 1.0, *arguments)
    return {launch.kernel.fn.__name__: launch for launch in found}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("kernel", "queries"), REGISTERS)
def test_resources(kernel, queries, capability):
    code = compiled(launches(queries, 64, torch.bfloat16)[kernel], capability)
    assert code.stack == 0, "spills"
    assert code.registers <= REGISTERS[kernel, queries]
    assert code.shared <= SHARED
    if capability in MATRIX_PRODUCT:
        assert count(code.instructions(), *MATRIX_PRODUCT[capability]), "no tensor cores"
    if capability == 90 and queries == 64:
        assert count(code.instructions(), "HGMMA"), "half of the tensor cores' speed"


@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
def test_resources_of_float32(kernel):
    code = compiled(launches(64, 64, torch.float32)[kernel], 80)
    assert code.stack == 0, "spills"
    assert code.shared <= SHARED


def test_resources_of_combine():
    code = compiled(launches(16, 64, torch.bfloat16)["_combine"], 90)
    assert code.stack == 0
    assert code.registers <= 96
    assert code.shared <= 4096
