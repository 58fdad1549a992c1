"""layer_norm_2d on every backend that runs here, against the float64 reference."""

import functools
import importlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor

import vfmk
from tests import operator_checks
from tests.operator_checks import TARGETS, Call
from vfmk.reference.channel_index import without_outside

NAME = "layer_norm_2d"
# Three sums over the channels and a root in fp32, and for weight and bias a sum over the pixels.
FP32_LIMIT = 2e-6
# Half precision rounds the cotangent as well: of a sum in which great terms cancel, little is left,
# which is measured by a share of the largest result.
LEAST_SHARE = 0.5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def operator(input, weight, bias, *, index=None, eps=1e-6):
    return vfmk.ops.layer_norm_2d(input, weight, bias, index, eps=eps)


def reference(input, weight, bias, *, index=None, eps=1e-6):
    index = None if index is None else index.cpu()
    return vfmk.reference.layer_norm_2d(input, weight, bias, index, eps=eps)


def eager(input, weight, bias, *, index=None, eps=1e-6):
    """As segment_anything's LayerNorm2d, then a gather."""
    mean = input.mean(1, keepdim=True)
    variance = (input - mean).pow(2).mean(1, keepdim=True)
    normalized = (input - mean) / torch.sqrt(variance + eps)
    output = weight[:, None, None] * normalized + bias[:, None, None]
    return output if index is None else output.index_select(1, index)


operator.__name__ = NAME


def call(**kwargs) -> Call:
    return Call(operator, reference, eager, kwargs)


def arguments(
    size, *, dtype=torch.float32, device="cpu", layout="contiguous"
) -> tuple[Tensor, Tensor, Tensor]:
    """input with a mean, weight and bias."""
    batch, channels, height, width = size
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) + 0.5).to(device, dtype)

    if layout == "contiguous":
        input = random(*size)
    elif layout == "channels_last":
        input = random(batch, height, width, channels).permute(0, 3, 1, 2)
    elif layout == "rows_of_wider":  # columns dense, every other stride larger
        input = random(*(n + 2 for n in size))[tuple(slice(1, -1) for _ in size)]
    elif layout == "channels_of_wider":  # channels dense, as a slice of tokens
        wider = random(batch, height + 1, width + 1, channels + 5)
        input = wider[:, 1:, 1:, 3:-2].permute(0, 3, 1, 2)
    else:
        assert layout == "neither"
        input = random(*size[:-1], 2 * width)[..., ::2]
    return input, random(channels), random(channels)


def maps(channels: int, device="cpu") -> dict[str, Tensor | None]:
    """As a search makes them, and any: with channels read twice and never, more and fewer."""
    random = torch.Generator().manual_seed(0)
    few = torch.arange(channels)
    few[: channels // 4] = channels - 1
    found = {
        "few": few,
        "any": torch.randint(channels, (channels,), generator=random),
        "more": torch.randint(channels, (channels + 9,), generator=random),
        "one": torch.tensor([channels // 2]),
    }
    return {"none": None, **{name: index.to(device) for name, index in found.items()}}


@pytest.fixture(params=TARGETS)
def device(request):
    backend, device = request.param
    with operator_checks.target(NAME, backend):
        yield device


LAYOUTS = ("contiguous", "channels_last", "rows_of_wider", "channels_of_wider", "neither")
SIZES = {
    "planes": (2, 20, 17, 33),
    "tokens": (2, 70, 5, 6),
    "one row": (1, 33, 1, 150),
    "one column": (2, 6, 9, 1),
    "one pixel": (3, 17, 1, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_float64(device, size, layout, dtype):
    args = arguments(SIZES[size], dtype=dtype, device=device, layout=layout)
    for index in maps(SIZES[size][1], device).values():
        operator_checks.check_accuracy(call(index=index), args, FP32_LIMIT, LEAST_SHARE)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_equals_sams(device, layout):
    (input, weight, bias) = arguments((2, 64, 9, 11), device=device, layout=layout)
    norm = LayerNorm2d(64).to(device)
    norm.load_state_dict({"weight": weight, "bias": bias})
    output = vfmk.ops.layer_norm_2d(input, weight, bias)
    assert operator_checks.relative_error(output, norm(input)) <= 1e-6


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_index_moves_bits(device, dtype, layout):
    args = arguments((2, 70, 13, 11), dtype=dtype, device=device, layout=layout)
    whole = vfmk.ops.layer_norm_2d(*args)
    for index in maps(70, device).values():
        expected = whole if index is None else whole[:, index]
        assert torch.equal(vfmk.ops.layer_norm_2d(*args, index), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_means_and_equal_channels(device, layout):
    """The variance is about the mean, and its root never of less than eps."""
    input, weight, bias = arguments((1, 48, 5, 9), device=device, layout=layout)
    far = (input + 4096, weight, bias)
    truth = vfmk.reference.layer_norm_2d(*(tensor.double() for tensor in far))
    # fp32 holds the mean to 2⁻¹², 2e-4 of the deviation.
    assert operator_checks.relative_error(vfmk.ops.layer_norm_2d(*far), truth) <= 5e-4
    flat = torch.full_like(input, 0.5)
    output = vfmk.ops.layer_norm_2d(flat, weight, bias, eps=0.25)
    torch.testing.assert_close(output, bias[:, None, None].expand_as(output))


def test_a_nan_is_not_lost(device):
    input, weight, bias = arguments((1, 20, 5, 9), device=device)
    input[0, 3, 2, 4] = torch.nan
    lost = vfmk.ops.layer_norm_2d(input, weight, bias).isnan()
    assert lost[0, :, 2, 4].all()
    assert lost.sum() == 20


def test_readers_are_summed_in_ascending_order(device):
    """1 - 1 + tiny is tiny, and no other order gives it."""
    input, weight, _ = arguments((1, 4, 1, 3), device=device)
    bias = torch.zeros(4, device=device, requires_grad=True)
    index = torch.tensor([1, 1, 0, 1], device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        input = input.repeat(1, 1, 2, 1).contiguous(memory_format=layout)
        output = vfmk.ops.layer_norm_2d(input, weight, bias, index)
        cotangent = torch.tensor([1.0, -1.0, 5.0, 1e-12], device=device).view(1, 4, 1, 1)
        mask = torch.zeros_like(output[:, :1])
        mask[..., 0, 0] = 1
        (gradient,) = torch.autograd.grad(output, bias, cotangent * mask)
        assert gradient.tolist() == [5.0, torch.tensor(1e-12).item(), 0.0, 0.0]


@pytest.mark.parametrize(
    ("size", "outputs"),
    [((0, 4, 5, 6), 3), ((2, 4, 0, 6), 3), ((2, 4, 5, 0), 3), ((2, 4, 5, 6), 0)],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_empty(device, size, outputs, layout):
    args = arguments(size, device=device, layout=layout)
    index = torch.arange(outputs, device=device)
    output, *gradients = operator_checks.value_and_gradients(call(index=index), args)
    assert output.shape == (size[0], outputs, *size[2:])
    for gradient, arg in zip(gradients, args, strict=True):
        assert gradient.shape == arg.shape
        assert not gradient.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeps_the_memory_format(device, layout):
    input, weight, bias = arguments((2, 6, 5, 7), device=device, layout=layout)
    leaf = operator_checks.preserving_leaf(input)
    output = vfmk.ops.layer_norm_2d(leaf, weight, bias, maps(6, device)["more"])
    (gradient,) = torch.autograd.grad(output.sum(), leaf)  # stride 0 everywhere
    channels_last = layout in ("channels_last", "channels_of_wider")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert output.is_contiguous(memory_format=memory_format)
    assert gradient.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_on_each_run(device, layout):
    args = arguments((3, 20, 33, 40), device=device, layout=layout)
    for name in ("none", "any"):
        same = call(index=maps(20, device)[name])
        operator_checks.check_deterministic(same, args)
        operator_checks.check_every_element_written(same, args)
        operator_checks.check_unwanted_gradients(same, args)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_for_any_number_of_threads(layout):
    with operator_checks.target(NAME, "cpu"):
        args = arguments((2, 20, 65, 40), layout=layout)
        operator_checks.check_threads(call(index=maps(20)["any"]), args)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    size=st.tuples(*(st.integers(low, high) for low, high in ((1, 3), (3, 40), (1, 6), (1, 40)))),
    layout=st.sampled_from(LAYOUTS),
    map=st.sampled_from(sorted(maps(3))),
)
def test_any_shape(device, size, layout, map):
    args = arguments(size, device=device, layout=layout)
    # An eps as large as the variance: of three channels, less makes a result of rounding.
    again = call(index=maps(size[1], device)[map], eps=1.0)
    operator_checks.check_accuracy(again, args, FP32_LIMIT, LEAST_SHARE)


SMALL = (2, 3, 4, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_cotangent(device, layout):
    args = arguments(SMALL, device=device, layout=layout)
    operator_checks.check_cotangents(call(index=maps(3, device)["any"]), args)


@pytest.mark.parametrize("map", ["none", "any"])
def test_gradcheck(map):
    operator_checks.check_gradcheck(call(index=maps(3)[map], eps=0.1), arguments(SMALL))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "neither"])
def test_opcheck(device, layout):
    args = arguments(SMALL, device=device, layout=layout)
    leaves = [operator_checks.preserving_leaf(arg) for arg in args]
    custom_op = torch.ops.vfmk.layer_norm_2d.default
    operator_checks.check_opcheck(custom_op, (*leaves, maps(3, device)["any"], 1e-6))
    operator_checks.check_opcheck(custom_op, (*leaves, None, 1e-6))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile(device, layout):
    args = arguments(SMALL, device=device, layout=layout)
    operator_checks.check_compile(call(index=maps(3, device)["any"]), args, batched=1)


def test_export(device):
    operator_checks.check_export(
        call(index=maps(3, device)["any"]), arguments(SMALL, device=device)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_computes_in_float32(device, dtype):
    """As PyTorch's layer_norm; gradients come in the arguments' own dtype."""
    input, weight, bias = arguments(SMALL, device=device)
    args = (input.to(dtype), weight, bias)
    with torch.autocast(device, dtype):
        output, *gradients = operator_checks.value_and_gradients(call(), args)
    expected, *others = operator_checks.value_and_gradients(call(), (args[0].float(), weight, bias))
    assert torch.equal(output, expected)
    for arg, gradient, other in zip(args, gradients, others, strict=True):
        assert gradient.dtype == arg.dtype
        assert torch.equal(gradient, other.to(arg.dtype))


def test_cuda_graph(device):
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    args = arguments((2, 16, 20, 20), device=device)
    index = maps(16, device)["any"]
    expected = vfmk.ops.layer_norm_2d(*args, index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = vfmk.ops.layer_norm_2d(*args, index)
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_index_out_of_range(device, layout):
    args = arguments((2, 4, 5, 6), device=device, layout=layout)
    for bad in (-1, 4, 2**40):
        index = torch.tensor([0, bad, 3], device=device)
        if device == "cpu":
            with pytest.raises(IndexError, match=f"^{NAME}: index holds {bad}, input has 4 chan"):
                vfmk.ops.layer_norm_2d(*args, index)
            continue
        output, *gradients = operator_checks.value_and_gradients(call(index=index), args)
        assert output[:, 1].isnan().all()
        assert output[:, [0, 2]].isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_reference_where_nobody_looks_at_the_index(monkeypatch):
    """As on CUDA: nothing outside is read, NaN comes out."""
    module = importlib.import_module("vfmk.reference.layer_norm_2d")
    monkeypatch.setattr(
        module, "positions", lambda operator, index, channels: without_outside(index, channels)
    )
    arguments = torch.randn(2, 4, 5, 6), torch.randn(4), torch.randn(4)
    index = torch.tensor([3, -1, 2, 2**40])
    with vfmk.use_backend("reference"):
        output, *gradients = operator_checks.value_and_gradients(
            functools.partial(operator, index=index), arguments
        )
        of_inside, *expected = operator_checks.value_and_gradients(
            functools.partial(operator, index=index[[0, 2]]), arguments
        )
    assert output[:, [1, 3]].isnan().all()
    torch.testing.assert_close(output[:, [0, 2]], of_inside)
    assert all(gradient.isfinite().all() for gradient in (*gradients, *expected))
    assert not gradients[1][[0, 1]].any()


INPUT, ONES, INDEX = torch.zeros(2, 4, 5, 6), torch.ones(4), torch.zeros(3, dtype=torch.int64)
BAD_INPUT = [  # arguments, keyword arguments, exception, message
    ((None, ONES, ONES), {}, TypeError, r"input must be a Tensor \[B, C, H, W\], got NoneType"),
    ((INPUT.int(), ONES, ONES), {}, TypeError, "input must be float32.*got int32"),
    ((INPUT[0], ONES, ONES), {}, ValueError, r"input must have the shape \[B, C, H, W\], got"),
    ((INPUT[:, :0], ONES[:0], ONES[:0]), {}, ValueError, r"input has no channels, \[2, 0, 5, 6\]"),
    ((INPUT, None, ONES), {}, TypeError, r"weight must be a Tensor \[C\], got NoneType"),
    ((INPUT, ONES[:3], ONES), {}, ValueError, "weight is for 3 channels, input has 4"),
    ((INPUT, ONES, ONES[:3]), {}, ValueError, "bias is for 3 channels, input has 4"),
    ((INPUT, ONES, ONES[None]), {}, ValueError, r"bias must have the shape \[C\], got \[1, 4\]"),
    ((INPUT, ONES.half(), ONES), {}, TypeError, "weight is float16, input is float32"),
    ((INPUT, ONES, ONES.to("meta")), {}, ValueError, "bias is on meta, input is on cpu"),
    ((INPUT, ONES, ONES, [0, 1]), {}, TypeError, r"index must be a Tensor \[C'\], got list"),
    ((INPUT, ONES, ONES, INDEX.int()), {}, TypeError, "index must be int64, got int32"),
    ((INPUT, ONES, ONES, INDEX[None]), {}, ValueError, r"index must have the shape \[C'\], got"),
    ((INPUT, ONES, ONES, INDEX.to("meta")), {}, ValueError, "index is on meta, input is on cpu"),
    ((INPUT, ONES, ONES), {"eps": "1"}, TypeError, "eps must be a number, got '1'"),
]


@pytest.mark.parametrize(("args", "kwargs", "exception", "message"), BAD_INPUT)
def test_bad_input(args, kwargs, exception, message):
    with pytest.raises(exception, match=f"^{NAME}: {message}"):
        vfmk.ops.layer_norm_2d(*args, **kwargs)
