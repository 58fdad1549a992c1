"""dynamic_conv2d in Triton, forward and backward through the operator, under the interpreter."""

import pytest
import torch

import vfmk
from tests import operator_checks
from tests.kernels.interpreter import interpreted
from tests.ops.test_dynamic_conv2d import FP32_LIMIT, GEOMETRIES, LAYOUTS, arguments, call

# bf16 under the interpreter truncates where hardware rounds: no better than one eps.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def check(args, **kwargs) -> None:
    with vfmk.use_backend("triton"):
        operator_checks.check_accuracy(call(**kwargs), args, FP32_LIMIT)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("geometry", [name for name in GEOMETRIES if name != "k3 large"])
@interpreted
def test_geometries(geometry, layout):
    size, outputs, kernel_size, kwargs = GEOMETRIES[geometry]
    check(arguments(size, outputs, kernel_size, layout=layout), **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@interpreted
def test_layouts(layout, dtype):
    check(arguments((2, 20, 9, 14), 18, (3, 3), layout=layout, dtype=DTYPES[dtype]))


@interpreted
def test_one_kernel_set_for_the_batch():
    check(arguments((3, 8, 5, 6), 6, (3, 3), shared=True))


@interpreted
def test_plane_over_several_splits():
    """Partial sums of grad_weight. The mean of 1 makes every sum grow along the plane."""
    input, weight, bias = arguments((1, 3, 40, 60), 4, (3, 3))
    check((input + 1, weight, bias))


@pytest.mark.parametrize("size", [(0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 6)])
@interpreted
def test_empty(size):
    args = arguments(size, 3, (3, 3))
    with vfmk.use_backend("triton"):
        output, *gradients = operator_checks.value_and_gradients(call(), args)
    assert torch.equal(output, args[2][:, :, None, None].expand(output.shape))
    assert not any(gradient.any() for gradient in gradients[:2])


@interpreted
def test_same_bits_and_every_element():
    args = arguments((2, 6, 9, 10), 5, (3, 3))
    with vfmk.use_backend("triton"):
        operator_checks.check_deterministic(call(), args)
        operator_checks.check_every_element_written(call(), args)
        operator_checks.check_unwanted_gradients(call(), args)


@interpreted
def test_offsets_beyond_32_bits():
    """A batch of items 2**30 elements apart; of what lies between, no page is touched."""
    _, weight, bias = arguments((3, 2, 3, 4), 2, (3, 3), dtype=torch.float16)
    memory = torch.empty(2**31 + 48, dtype=torch.float16)
    input = memory.as_strided((3, 2, 3, 4), (2**30, 12, 4, 1))
    input.copy_(torch.randn(input.shape))
    with vfmk.use_backend("triton"):
        output = vfmk.ops.dynamic_conv2d(input, weight, bias)
    expected = vfmk.reference.dynamic_conv2d(input, weight, bias)
    assert operator_checks.relative_error(output, expected) <= torch.finfo(torch.float16).eps


def test_not_supported():
    kernels = pytest.importorskip("vfmk.kernels.dynamic_conv2d")

    def reason(size: tuple[int, ...], weight: tuple[int, ...]) -> str:
        tensors = (torch.empty(shape, device="meta") for shape in (size, weight))
        return kernels.not_supported(*tensors, (1, 1, 1, 1))

    assert reason((2, 2, 4, 4), (2, 3, 2, 3, 3)) == ""
    assert "plane" in reason((1, 1, 2**15, 2**15), (1, 1, 1, 3, 3))
    assert "kernel set" in reason((1, 2**15, 4, 4), (1, 2**16, 2**15, 1, 1))
    assert "batch" in reason((2**16, 1, 4, 4), (1, 1, 1, 3, 3))
