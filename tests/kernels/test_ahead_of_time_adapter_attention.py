"""Limits on what ptxas makes of adapter_attention's Triton kernels, without a GPU.

A spill, or registers or shared memory past a limit, and fewer programs hide each other's latency:
raise a limit only with a measurement on a GPU beside it.
"""

import pytest
import torch

from tests.kernels.aot import CAPABILITIES, Launch, compiled, count, recorded
from vfmk.kernels import adapter_attention

# Registers of a thread, at most, over architectures (16 more on sm_120), in Triton 3.9, by
# kernel and rank. A multiprocessor has 65,536: for two programs of 8 warps with 128 each, or three
# of 4 warps with 168.
REGISTERS = {
    ("_forward", 32): 128,
    ("_forward", 64): 224,
    ("_backward_queries", 32): 168,
    ("_backward_queries", 64): 252,
    ("_backward_keys", 32): 128,
    ("_backward_keys", 64): 192,
}
SHARED = 48 * 1024  # bytes of a program: three together have less than a multiprocessor of sm_80
MOST_SHARED = 99 * 1024  # all that one program has on sm_86, sm_89 and sm_120
# Products of a tile of the input, or of projected queries, with what a program holds.
MATRIX_PRODUCT = {80: "HMMA.16816", 86: "HMMA.16816", 90: "HGMMA", 100: "UTCHMMA"}
# Rank 64 where the compilation differs: it takes seconds for each.
CASES = [
    (kernel, rank, capability)
    for kernel, rank in REGISTERS
    for capability in (CAPABILITIES if rank == 32 else (80, 90, 100, 120))
]


def launches(
    rank: int, heads: int, dtype: torch.dtype, batch: int = 8, tokens: int = 4096
) -> dict[str, Launch]:
    """By kernel, those of one forward and one whole backward."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    input, output = empty(batch, tokens, rank), empty(batch, tokens, rank)
    parameters = (empty(3 * rank, rank), empty(3 * rank))
    log_sum_exp = empty(batch, heads, tokens, dtype=torch.float32)
    arguments = (input, *parameters)
    with recorded() as found:
        adapter_attention.forward(*arguments, heads, 0.2, output, log_sum_exp)
        adapter_attention.backward(
            *(output, *arguments, output, log_sum_exp, heads, 0.2), *arguments
        )
    return {launch.kernel.fn.__name__: launch for launch in found}


@pytest.mark.parametrize(("kernel", "rank", "capability"), CASES)
def test_resources(kernel, rank, capability):
    code = compiled(launches(rank, 1, torch.bfloat16)[kernel], capability)
    assert code.stack == 0, "spills"
    assert code.registers <= REGISTERS[kernel, rank] + (16 if capability == 120 else 0)
    assert code.shared <= SHARED
    if capability in MATRIX_PRODUCT:
        assert count(code.instructions(), MATRIX_PRODUCT[capability]), "no tensor cores"


@pytest.mark.parametrize("kernel", ["_forward", "_backward_queries"])
def test_resources_of_heads(kernel):
    for capability in (80, 90):
        code = compiled(launches(32, 4, torch.float16)[kernel], capability)
        assert code.stack == 0, "spills"
        assert code.registers <= REGISTERS[kernel, 64]
        assert code.shared <= SHARED
        assert count(code.instructions(), MATRIX_PRODUCT[capability]), "no tensor cores"


@pytest.mark.parametrize("kernel", ["_forward", "_backward_keys"])
def test_resources_of_few_programs(kernel):
    """One image: tiles are halved, and ragged ones masked."""
    code = compiled(launches(32, 1, torch.bfloat16, 1, 4095)[kernel], 90)
    assert code.stack == 0, "spills"
    assert code.registers <= REGISTERS[kernel, 64]
    assert count(code.instructions(), "HGMMA"), "no tensor cores"


@pytest.mark.parametrize("rank", [32, 64])
@pytest.mark.parametrize("kernel", ["_forward", "_backward_queries", "_backward_keys"])
def test_resources_of_float32(kernel, rank):
    code = compiled(launches(rank, 1, torch.float32)[kernel], 80)
    assert code.stack == 0, "spills"
    assert code.shared <= MOST_SHARED
