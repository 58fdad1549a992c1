"""dynamic_depthwise_conv2d on every backend that runs here, against the float64 reference."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vfmk
from tests import operator_checks
from tests.operator_checks import Call

NAME = "dynamic_depthwise_conv2d"
# Sums of up to 49 products (forward) and of a plane's 4,096 (weight gradient) in fp32.
FP32_LIMIT = 3e-6
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def eager(input, weight, bias=None, *, padding="same", dilation=1):
    """PyTorch's way: one grouped convolution with B·C groups."""
    batch, channels, height, width = input.shape
    kernels = weight.expand(batch, -1, -1, -1).reshape(batch * channels, 1, *weight.shape[2:])
    output = F.conv2d(
        input.reshape(1, batch * channels, height, width),
        kernels,
        groups=batch * channels,
        padding=padding,
        dilation=dilation,
    )
    output = output.view(batch, channels, *output.shape[2:])
    return output if bias is None else output + bias[:, :, None, None]


def call(**kwargs) -> Call:
    return Call(
        vfmk.ops.dynamic_depthwise_conv2d, vfmk.reference.dynamic_depthwise_conv2d, eager, kwargs
    )


def in_layout(random: Callable[..., Tensor], size: tuple[int, ...], layout: str) -> Tensor:
    """A random input [B, C, H, W], of numbers from `random(*shape)`."""
    batch, channels, height, width = size
    if layout == "contiguous":
        return random(*size)
    if layout == "channels_last":
        return random(*size).to(memory_format=torch.channels_last)
    if layout == "rows_of_wider":  # columns dense, every other stride larger
        return random(batch, channels + 2, height + 1, width + 3)[:, 1:-1, 1:, 2:-1]
    if layout == "channels_of_wider":  # channels dense, as a slice of tokens
        return random(batch, height, width, channels + 5)[..., 3:-2].permute(0, 3, 1, 2)
    assert layout == "neither"
    return random(batch, channels, height, 2 * width)[..., ::2]


def arguments(
    size, kernel_size, *, dtype=torch.float32, device="cpu", layout="contiguous", shared=False
) -> tuple[Tensor, Tensor, Tensor]:
    """Input [B, C, H, W] in a layout, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    batch, channels = size[:2]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    kernel_batch = 1 if shared else batch
    weight = random(kernel_batch, channels, *kernel_size)
    bias = random(kernel_batch, channels)
    return in_layout(random, size, layout), weight, bias


LAYOUTS = ("contiguous", "channels_last", "rows_of_wider", "channels_of_wider", "neither")
GEOMETRIES = {  # size, kernel, keyword arguments
    "k3": ((2, 20, 17, 33), (3, 3), {}),
    "k5": ((2, 20, 17, 33), (5, 5), {}),
    "k7": ((2, 20, 17, 33), (7, 7), {}),
    "k3 large": ((2, 5, 64, 64), (3, 3), {}),
    "k7 wide": ((1, 16, 9, 150), (7, 7), {}),
    "k1": ((2, 9, 6, 7), (1, 1), {}),
    "even": ((2, 9, 11, 12), (4, 2), {}),
    "rectangular": ((2, 9, 11, 12), (3, 5), {}),
    "k9": ((1, 8, 13, 14), (9, 9), {}),
    "dilated": ((2, 9, 15, 16), (3, 3), {"dilation": 2}),
    "dilated unevenly": ((2, 9, 15, 16), (3, 5), {"dilation": (3, 2)}),
    "unpadded": ((2, 9, 15, 16), (3, 3), {"padding": 0}),
    "padded beyond the kernel": ((2, 9, 5, 6), (3, 3), {"padding": (4, 5)}),
    "one pixel": ((3, 17, 1, 1), (3, 3), {}),
    "one channel": ((3, 1, 5, 40), (5, 5), {}),
    "kernel larger than the image": ((2, 9, 2, 3), (7, 7), {}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equals_float64(device, geometry, layout, dtype):
    size, kernel_size, kwargs = GEOMETRIES[geometry]
    args = arguments(size, kernel_size, dtype=dtype, device=device, layout=layout)
    operator_checks.check_accuracy(call(**kwargs), args, FP32_LIMIT)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_kernel_set_for_the_batch(device, layout):
    args = arguments((3, 20, 9, 10), (3, 3), device=device, layout=layout, shared=True)
    operator_checks.check_accuracy(call(), args, FP32_LIMIT)


def test_per_sample_weight_with_shared_bias(device):
    input, weight, _ = arguments((3, 20, 9, 10), (3, 3), device=device)
    bias = torch.randn(1, 20, device=device)
    operator_checks.check_accuracy(call(), (input, weight, bias), FP32_LIMIT)


def test_without_bias(device):
    input, weight, _ = arguments((2, 5, 9, 10), (5, 5), device=device)
    operator_checks.check_accuracy(call(), (input, weight), FP32_LIMIT)


def test_large_plane_sums_accurately(device):
    args = arguments((1, 2, 256, 256), (3, 3), device=device)
    operator_checks.check_accuracy(call(), args, FP32_LIMIT)


def test_large_values_stay_finite(device):
    input, weight, bias = arguments((1, 4, 8, 8), (3, 3), dtype=torch.bfloat16, device=device)
    operator_checks.check_accuracy(call(), (input * 1e30, weight, bias), FP32_LIMIT)


def test_nan_and_infinity_reach_the_output(device):
    input, weight, bias = arguments((1, 4, 8, 40), (3, 3), dtype=torch.bfloat16, device=device)
    input[0, 0, 3, 3], input[0, 1, 3, 3] = float("nan"), float("inf")
    output = vfmk.ops.dynamic_depthwise_conv2d(input, weight, bias)
    expected = vfmk.reference.dynamic_depthwise_conv2d(input, weight, bias)
    assert not output[~expected.isfinite()].isfinite().any()
    if device == "cpu":
        assert torch.equal(output.isnan(), expected.isnan())
        assert torch.equal(output.isinf(), expected.isinf())
    else:  # on tensor cores they reach up to 11 columns away, as the operator says
        assert output[:, :, :, 3 + 11 + 1 :].isfinite().all()
        assert output[:, 2:].isfinite().all()


@pytest.mark.parametrize("size", [(0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0)])
def test_empty(device, size):
    args = arguments(size, (3, 3), device=device)
    output, *gradients = operator_checks.value_and_gradients(call(), args)
    assert output.shape == size
    for gradient, arg in zip(gradients, args, strict=True):
        assert gradient.shape == arg.shape
        assert not gradient.any()


def test_empty_input_with_padding_is_the_bias(device):
    input, weight, bias = arguments((2, 4, 0, 6), (3, 3), device=device)
    output = vfmk.ops.dynamic_depthwise_conv2d(input, weight, bias, padding=2)
    assert torch.equal(output, bias[:, :, None, None].expand(2, 4, 2, 8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeps_the_memory_format(device, layout):
    input, weight, bias = arguments((2, 6, 5, 7), (3, 3), device=device, layout=layout)
    leaf = operator_checks.preserving_leaf(input)
    output = vfmk.ops.dynamic_depthwise_conv2d(leaf, weight, bias, padding=2)
    (gradient,) = torch.autograd.grad(output.sum(), leaf)
    channels_last = layout in ("channels_last", "channels_of_wider")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert output.is_contiguous(memory_format=memory_format)
    assert gradient.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel_size", [(3, 3), (7, 7), (2, 4)])
def test_same_bits_on_each_run(device, layout, kernel_size):
    args = arguments((2, 20, 33, 40), kernel_size, device=device, layout=layout)
    operator_checks.check_deterministic(call(), args)
    operator_checks.check_every_element_written(call(), args)
    operator_checks.check_unwanted_gradients(call(), args)


def test_same_bits_for_any_number_of_threads():
    with operator_checks.target(NAME, "cpu"):
        operator_checks.check_threads(call(), arguments((2, 20, 33, 40), (5, 5)))


def test_any_cotangent(device):
    operator_checks.check_cotangents(call(), arguments(*SMALL, device=device))


def test_expanded_gradient(device):
    input, weight, bias = arguments((2, 6, 5, 7), (3, 3), device=device)
    leaf = operator_checks.preserving_leaf(input)
    vfmk.ops.dynamic_depthwise_conv2d(leaf, weight, bias).sum().backward()  # stride 0 everywhere
    expected = operator_checks.preserving_leaf(input)
    vfmk.reference.dynamic_depthwise_conv2d(expected, weight, bias).sum().backward()
    assert operator_checks.relative_error(leaf.grad, expected.grad) <= FP32_LIMIT


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    size=st.tuples(*(st.integers(1, limit) for limit in (3, 19, 20, 40))),
    kernel_size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(device, size, kernel_size, dilation, layout):
    args = arguments(size, kernel_size, device=device, layout=layout)
    # The bias gradient of one channel may cancel to almost nothing.
    operator_checks.check_accuracy(call(dilation=dilation), args, FP32_LIMIT, least_share=0.1)


SMALL = ((2, 3, 4, 5), (3, 3))


@pytest.mark.parametrize("kwargs", [{}, {"padding": 1, "dilation": 2}], ids=str)
def test_gradcheck(kwargs):
    operator_checks.check_gradcheck(call(**kwargs), arguments(*SMALL))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, layout):
    args = arguments(*SMALL, device=device, layout=layout)
    leaves = [operator_checks.preserving_leaf(arg) for arg in args]
    operator_checks.check_opcheck(
        torch.ops.vfmk.dynamic_depthwise_conv2d.default, (*leaves, (1, 1, 1, 1), (1, 1))
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile(device, layout):
    args = arguments(*SMALL, device=device, layout=layout)
    operator_checks.check_compile(call(), args, batched=3)


def test_export(device):
    operator_checks.check_export(call(), arguments(*SMALL, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device, dtype):
    operator_checks.check_autocast(call(), arguments(*SMALL, device=device), dtype)


def test_autocast_does_not_mix_with_float64():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="weight is float64"):
        vfmk.ops.dynamic_depthwise_conv2d(INPUT, WEIGHT.double())


def test_meta_tensors():
    output = vfmk.ops.dynamic_depthwise_conv2d(INPUT.to("meta"), WEIGHT.to("meta"))
    assert output.shape == INPUT.shape


def test_cuda_graph(device):
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    args = arguments((2, 16, 20, 20), (3, 3), device=device)
    expected = call()(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()(*args)
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)


INPUT, WEIGHT, BIAS = torch.zeros(2, 4, 5, 6), torch.zeros(2, 4, 3, 3), torch.zeros(2, 4)
BAD_INPUT = [  # arguments, keyword arguments, exception, message
    ((None, WEIGHT), {}, TypeError, r"input must be a Tensor \[B, C, H, W\], got NoneType"),
    ((INPUT.int(), WEIGHT), {}, TypeError, "input must be float32.*got int32"),
    ((INPUT[0], WEIGHT), {}, ValueError, r"input must have the shape \[B, C, H, W\], got \[4, 5"),
    ((INPUT, WEIGHT[0]), {}, ValueError, "weight must have the shape"),
    ((INPUT, WEIGHT[:, :3]), {}, ValueError, "weight has 3 channels, input has 4"),
    ((INPUT, WEIGHT[[0, 0, 0]]), {}, ValueError, "weight has a batch of 3, expected 2 or 1"),
    ((INPUT, WEIGHT[..., :0]), {}, ValueError, "weight has an empty kernel"),
    ((INPUT, WEIGHT.double()), {}, TypeError, "weight is float64, input is float32"),
    ((INPUT, WEIGHT.to("meta")), {}, ValueError, "weight is on meta, input is on cpu"),
    ((INPUT, WEIGHT, BIAS[0]), {}, ValueError, "bias must have the shape"),
    ((INPUT, WEIGHT, BIAS[:, :3]), {}, ValueError, "bias has 3 channels, input has 4"),
    ((INPUT, WEIGHT, BIAS.half()), {}, TypeError, "bias is float16, input is float32"),
    ((INPUT, WEIGHT), {"padding": "valid"}, ValueError, 'padding must be "same" or ints'),
    ((INPUT, WEIGHT), {"padding": -1}, ValueError, "padding must be at least 0"),
    ((INPUT, WEIGHT), {"padding": 1.5}, TypeError, "padding must be an int or a pair of ints"),
    ((INPUT, WEIGHT), {"padding": (1, 2, 3)}, TypeError, "padding must be an int or a pair"),
    ((INPUT, WEIGHT), {"dilation": 0}, ValueError, "dilation must be at least 1"),
    ((INPUT, WEIGHT), {"dilation": True}, TypeError, "dilation must be an int or a pair"),
    ((INPUT, WEIGHT), {"padding": 0, "dilation": 3}, ValueError, "does not fit into input"),
]


@pytest.mark.parametrize(("args", "kwargs", "exception", "message"), BAD_INPUT)
def test_bad_input(args, kwargs, exception, message):
    with pytest.raises(exception, match=f"^{NAME}: .*{message}"):
        vfmk.ops.dynamic_depthwise_conv2d(*args, **kwargs)
