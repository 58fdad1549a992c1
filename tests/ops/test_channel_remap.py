"""channel_remap on every backend that runs here, against the float64 reference."""

import functools
import importlib

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vfmk
from tests import operator_checks
from tests.operator_checks import TARGETS, Call
from vfmk import _backends
from vfmk.reference.channel_index import without_outside

NAME = "channel_remap"
# Sums of a few products (grad_input) and of a plane's (grad_scale) in fp32.
FP32_LIMIT = 1e-6
# Half precision rounds the cotangent as well: of a sum in which great terms cancel, little is left.
LEAST_SHARE = 0.3
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def eager(input, scale, *, index, dim=1):
    """PyTorch's way: advanced indexing, then a product."""
    shape = [1] * input.dim()
    shape[dim] = index.shape[-1]
    if index.dim() == 2:
        shape[0] = index.shape[0]
        output = torch.stack(
            [x.index_select(dim % input.dim() - 1, i) for x, i in zip(input, index, strict=True)]
        )
    else:
        output = input.index_select(dim, index)
    return output if scale is None else output * scale.view(shape)


def operator(input, scale=None, *, index, dim=1):
    return vfmk.ops.channel_remap(input, index, scale, dim=dim)


def reference(input, scale=None, *, index, dim=1):
    return vfmk.reference.channel_remap(input, index.cpu(), scale, dim=dim)


operator.__name__ = NAME


def call(**kwargs) -> Call:
    return Call(operator, reference, eager, kwargs)


def arguments(
    size, outputs, *, dim=1, per_sample=False, dtype=torch.float32, device="cpu",
    layout="contiguous",
) -> tuple[tuple[Tensor, Tensor], Tensor]:  # fmt: skip
    """(input, scale) and an index in which some channels are read twice and some never."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    maps = (size[0], outputs) if per_sample else (outputs,)
    index = torch.randint(size[dim], maps, generator=generator).to(device)
    scale = random(*maps)
    if layout == "contiguous":
        input = random(*size)
    elif layout == "channels_last":
        moved = [*size[:dim], *size[dim + 1 :], size[dim]]
        input = random(*moved).movedim(-1, dim)
    elif layout == "rows_of_wider":  # columns dense, every other stride larger
        input = random(*(n + 2 for n in size))[tuple(slice(1, -1) for _ in size)]
    elif layout == "channels_of_wider":  # channels dense, as a slice of tokens
        moved = [*(n + 1 for n in size[:dim] + size[dim + 1 :]), size[dim] + 5]
        cut = tuple(slice(1, None) for _ in size[1:])
        input = random(*moved)[(*cut, slice(3, -2))].movedim(-1, dim)
    else:
        assert layout == "neither"
        input = random(*size[:-1], 2 * size[-1])[..., ::2]
    return (input, scale), index


@pytest.fixture(params=TARGETS)
def device(request):
    backend, device = request.param
    with operator_checks.target(NAME, backend):
        yield device


LAYOUTS = ("contiguous", "channels_last", "rows_of_wider", "channels_of_wider", "neither")
GEOMETRIES = {  # size, output channels, dim
    "planes": ((2, 20, 17, 33), 20, 1),
    "many planes": ((2, 5, 64, 70), 9, 1),
    "more channels out": ((2, 7, 6, 5), 40, 1),
    "one out": ((2, 33, 7, 5), 1, 1),
    "tokens": ((3, 19, 37), 37, 2),
    "grid of tokens": ((2, 5, 7, 24), 30, 3),
    "second": ((2, 3, 16, 5, 9), 17, 2),
    "one pixel": ((3, 17, 1, 1), 17, 1),
    "one channel": ((3, 1, 5, 40), 4, 1),
    "one column": ((2, 6, 9, 1), 6, 1),
    "negative": ((2, 18, 5, 6), 18, -3),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_sample", [False, True], ids=["one map", "map for each sample"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equals_float64(device, geometry, per_sample, layout, dtype):
    size, outputs, dim = GEOMETRIES[geometry]
    args, index = arguments(
        size, outputs, dim=dim % len(size), per_sample=per_sample, dtype=dtype, device=device,
        layout=layout,
    )  # fmt: skip
    for scale in (args[1], None):
        operator_checks.check_accuracy(
            call(index=index, dim=dim), (args[0], scale), FP32_LIMIT, LEAST_SHARE
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_first_dimension(device, layout):
    args, index = arguments((9, 4, 6), 12, dim=0, device=device, layout=layout)
    operator_checks.check_accuracy(call(index=index, dim=0), args, FP32_LIMIT)


def test_vector(device):
    args, index = arguments((9,), 12, dim=0, device=device)
    operator_checks.check_accuracy(call(index=index, dim=0), args, FP32_LIMIT)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_few_channels_exchanged(device, layout):
    """As a search makes them: most neighbours stay neighbours."""
    (input, scale), index = arguments((2, 64, 9, 11), 64, device=device, layout=layout)
    index = torch.arange(64, device=device)
    index[[3, 40]] = torch.tensor([17, 0], device=device)
    assert torch.equal(
        vfmk.ops.channel_remap(input, index, scale), input[:, index] * scale.view(-1, 1, 1)
    )
    for dtype in DTYPES:
        args = (input.to(dtype), scale.to(dtype))
        operator_checks.check_accuracy(call(index=index), args, FP32_LIMIT, LEAST_SHARE)
        operator_checks.check_accuracy(call(index=index), (args[0], None), FP32_LIMIT, LEAST_SHARE)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("outputs", [61, 64, 70])
def test_few_channels_exchanged_and_some_cut_or_added(device, layout, outputs):
    """One map so, and one of any channels; what is overwritten by another channel is not read."""
    (input, scale), index = arguments(
        (2, 64, 9, 11), outputs, per_sample=True, device=device, layout=layout
    )
    index[0] = torch.arange(outputs, device=device)
    index[0, 64:] = 9
    index[0, [3, 40]] = torch.tensor([17, 0], device=device)
    check = functools.partial(operator_checks.check_accuracy, call(index=index))
    for dtype in DTYPES:
        args = (input.to(dtype), scale.to(dtype))
        check(args, FP32_LIMIT, LEAST_SHARE)
        check((args[0], None), FP32_LIMIT, LEAST_SHARE)
    expected = operator_checks.value_and_gradients(call(index=index), (input, scale))
    input[0, [3, 40]] = torch.nan
    found = operator_checks.value_and_gradients(call(index=index), (input, scale))
    assert torch.equal(found[0][0], expected[0][0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2][0], expected[2][0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["two exchanged", "permutation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_larger_than_the_caches(dtype, kind, layout):
    """Results of 16 MiB and more go past them. One product each, so eager has the same bits."""
    with operator_checks.target(NAME, "cpu"):
        channels = 64 if dtype == torch.float32 else 128
        args, _ = arguments((1, channels, 256, 260), channels, dtype=dtype, layout=layout)
        index = torch.randperm(channels, generator=torch.Generator().manual_seed(0))
        if kind == "two exchanged":
            index = torch.arange(channels)
            index[[3, 40]] = torch.tensor([40, 3])
        assert torch.equal(vfmk.ops.channel_remap(args[0], index), args[0].index_select(1, index))
        output, grad_input, grad_scale = operator_checks.value_and_gradients(
            call(index=index), args
        )
        assert output.nbytes >= 16 << 20
        expected = operator_checks.value_and_gradients(
            Call(eager, reference, eager, {"index": index}), args
        )
        assert torch.equal(output, expected[0])
        assert torch.equal(grad_input, expected[1])
        assert operator_checks.relative_error(grad_scale, expected[2]) <= 1e-2


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_values_are_moved_as_they_are(device, layout):
    """Without a scale nothing is computed: NaN, infinities and signed zeros go through."""
    (input, _), index = arguments((2, 8, 5, 9), 8, device=device, layout=layout)
    input[0, :, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    output, expected = vfmk.ops.channel_remap(input, index), input[:, index]
    assert torch.equal(output.view(torch.int32), expected.view(torch.int32))


def test_duplicates_are_summed_in_ascending_order(device):
    """1 - 1 + tiny is tiny, and no other order gives it."""
    input = torch.zeros(1, 2, 1, 3, device=device, requires_grad=True)
    output = vfmk.ops.channel_remap(input, torch.tensor([1, 1, 0, 1], device=device))
    cotangent = torch.tensor([1.0, -1.0, 5.0, 1e-12], device=device).view(1, 4, 1, 1)
    output.backward(cotangent.expand(1, 4, 1, 3))
    assert input.grad[0, :, 0].tolist() == [[5.0] * 3, [torch.tensor(1e-12).item()] * 3]


@pytest.mark.parametrize(
    ("size", "outputs"),
    [((0, 4, 5, 6), 3), ((2, 4, 0, 6), 3), ((2, 4, 5, 0), 3), ((2, 4, 5, 6), 0)],
)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_empty(device, size, outputs, per_sample, layout):
    args, index = arguments(size, outputs, per_sample=per_sample, device=device, layout=layout)
    output, *gradients = operator_checks.value_and_gradients(call(index=index), args)
    assert output.shape == (size[0], outputs, *size[2:])
    on_meta = vfmk.ops.channel_remap(args[0].to("meta"), index.to("meta"))
    assert output.stride() == on_meta.stride()
    for gradient, arg in zip(gradients, args, strict=True):
        assert gradient.shape == arg.shape
        assert not gradient.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeps_the_memory_format(device, layout):
    (input, scale), index = arguments((2, 6, 5, 7), 9, device=device, layout=layout)
    leaf = operator_checks.preserving_leaf(input)
    output = vfmk.ops.channel_remap(leaf, index, scale)
    (gradient,) = torch.autograd.grad(output.sum(), leaf)  # stride 0 everywhere
    channels_last = layout in ("channels_last", "channels_of_wider")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert output.is_contiguous(memory_format=memory_format)
    assert gradient.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_same_bits_on_each_run(device, layout, per_sample):
    args, index = arguments(
        (3, 20, 33, 40), 24, per_sample=per_sample, device=device, layout=layout
    )
    operator_checks.check_deterministic(call(index=index), args)
    operator_checks.check_every_element_written(call(index=index), args)
    operator_checks.check_unwanted_gradients(call(index=index), args)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_for_any_number_of_threads(layout):
    with operator_checks.target(NAME, "cpu"):
        args, index = arguments((2, 20, 33, 40), 20, layout=layout)
        operator_checks.check_threads(call(index=index), args)


def test_the_input_is_kept_for_its_scale_alone():
    """Backward without a scale needs the index, not the activation."""
    (input, scale), index = arguments((2, 6, 5, 7), 6)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vfmk.ops.channel_remap(input.requires_grad_(), index, scale)
    assert all(tensor.shape != input.shape for tensor in kept)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    size=st.tuples(*(st.integers(1, limit) for limit in (3, 40, 6, 40))),
    outputs=st.integers(1, 40),
    dim=st.integers(1, 3),
    per_sample=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)
@example(  # a sum that cancels
    size=(1, 2, 2, 2), outputs=1, dim=1, per_sample=False, layout="channels_of_wider"
)
def test_any_shape(device, size, outputs, dim, per_sample, layout):
    args, index = arguments(
        size, outputs, dim=dim, per_sample=per_sample, device=device, layout=layout
    )
    check_products(call(index=index, dim=dim), args)


def check_products(call: Call, args: tuple[Tensor, Tensor]) -> None:
    """Every result is a sum of products: its error, of the sum of their absolute values."""

    def true(*args: Tensor) -> Tensor:
        return call.reference(*args, **call.kwargs)

    def results(function, cotangent: Tensor, args) -> list[Tensor]:
        leaves = [operator_checks.preserving_leaf(arg) for arg in args]
        output = function(*leaves)
        gradients = torch.autograd.grad(output, leaves, cotangent.to(output))
        return [result.detach().cpu().double() for result in (output, *gradients)]

    doubles = [arg.cpu().double() for arg in args]
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(true(*doubles).shape, generator=generator)
    for value, expected, magnitude in zip(
        results(call, cotangent, args),
        results(true, cotangent, doubles),
        results(true, cotangent.abs(), [double.abs() for double in doubles]),
        strict=True,
    ):
        assert ((value - expected).abs() <= FP32_LIMIT * magnitude).all()


SMALL = ((2, 3, 4, 5), 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_cotangent(device, layout):
    args, index = arguments(*SMALL, device=device, layout=layout)
    operator_checks.check_cotangents(call(index=index), args)


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradcheck(per_sample):
    args, index = arguments(*SMALL, per_sample=per_sample)
    operator_checks.check_gradcheck(call(index=index), args)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, layout):
    (input, scale), index = arguments(*SMALL, device=device, layout=layout)
    leaves = operator_checks.preserving_leaf(input), operator_checks.preserving_leaf(scale)
    custom_op = torch.ops.vfmk.channel_remap.default
    operator_checks.check_opcheck(custom_op, (leaves[0], index, leaves[1], 1))
    operator_checks.check_opcheck(custom_op, (leaves[0], index, None, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile(device, layout):
    args, index = arguments(*SMALL, device=device, layout=layout)
    operator_checks.check_compile(call(index=index), args, batched=1)


def test_export(device):
    args, index = arguments(*SMALL, device=device)
    operator_checks.check_export(call(index=index), args)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device, dtype):
    args, index = arguments(*SMALL, device=device)
    operator_checks.check_autocast(call(index=index), args, dtype)
    with torch.autocast(device, dtype):  # nothing is computed, so nothing is cast
        assert vfmk.ops.channel_remap(args[0], index).dtype == torch.float32


ON_DEVICES = [
    pytest.param("cpu"),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("device", ON_DEVICES)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(
    ("size", "dim", "layout", "copied"),
    [
        ((2, 6, 5, 7), 1, "contiguous", False),
        ((2, 6, 5, 7), 1, "channels_last", False),
        ((2, 6, 5, 7), 1, "rows_of_wider", False),
        ((2, 6, 5, 7), 1, "channels_of_wider", False),
        ((2, 6, 5, 7), 1, "neither", True),
        ((2, 5, 7, 6), 3, "contiguous", False),
        ((2, 5, 7, 6), 3, "channels_of_wider", False),
        ((2, 5, 7, 6), 3, "neither", True),
        ((2, 5, 6), -1, "contiguous", False),
        ((2, 5, 6), -1, "rows_of_wider", False),
        ((2, 5, 6, 7), 2, "contiguous", False),
        ((2, 5, 6, 7), 2, "rows_of_wider", True),
        ((2, 3, 6, 5, 7), 2, "contiguous", False),
        ((2, 3, 6, 5, 7), 2, "channels_last", False),
        ((2, 6, 3, 5, 7), 1, "channels_of_wider", True),
        ((2, 3, 1, 5, 7), 2, "neither", True),
    ],
)
def test_views_are_read_in_place(device, size, dim, layout, copied, per_sample):
    with operator_checks.target(NAME, device):
        (input, scale), index = arguments(
            size, 9, dim=dim, per_sample=per_sample, layout=layout, device=device
        )
        with torch.profiler.profile() as profile:
            output = vfmk.ops.channel_remap(input, index, scale, dim=dim)
        assert ("aten::copy_" in {event.name for event in profile.events()}) == copied
        on_meta = [t.to("meta").as_strided(t.shape, t.stride()) for t in (input, index, scale)]
        expected = vfmk.ops.channel_remap(*on_meta, dim=dim)
        assert output.stride() == expected.stride()
        backward = torch.ops.vfmk.channel_remap_backward
        rest = size[dim], dim % len(size), layout.startswith("channels"), (True, True)
        for gradient, like in zip(
            backward(output, input, index, scale, *rest), backward(expected, *on_meta, *rest),
            strict=True,
        ):  # fmt: skip
            assert gradient.stride() == like.stride()


@pytest.mark.parametrize("device", ON_DEVICES)
def test_what_a_native_call_must_not_read_it_refuses(device):
    """Nobody but the native library has checked these arguments."""
    with operator_checks.target(NAME, device):
        (input, scale), index = arguments((2, 6, 5, 7), 9, device=device)
        forward = torch.ops.vfmk_native.channel_remap_forward
        fits = dict(input=input, index=index, scale=scale, dim=1)
        assert torch.equal(forward(**fits), vfmk.ops.channel_remap(input, index, scale))
        maps = index.expand(2, -1)
        for wrong in (
            {"input": input.double(), "scale": scale.double()},
            {"input": input[0, 0, 0, 0]},
            {"index": index.int()},
            {"index": index[0]},
            {"index": maps[:1], "scale": scale[None]},
            {"index": maps, "scale": scale.expand(2, -1), "dim": 0},
            {"scale": scale[1:]},
            {"scale": scale[None]},
            {"scale": scale.double()},
            {"scale": scale.half()},
            {"dim": 4},
            {"dim": -5},
        ):
            assert forward(**fits | wrong) is None, wrong

        backward = torch.ops.vfmk_native.channel_remap_backward
        fits |= dict(
            grad_output=torch.zeros(2, 9, 5, 7, device=device), input_channels=6,
            channels_last=False, input_wanted=True, scale_wanted=True,
        )  # fmt: skip
        backward(**fits)
        for wrong in (
            {"grad_output": fits["grad_output"].double()},
            {"grad_output": fits["grad_output"][:, 1:]},
            {"index": index.int()},
            {"scale": scale[1:]},
            {"scale": None},
            {"input": None},
            {"input": input.half()},
            {"input": input[..., 1:]},
            {"input": input[:, 1:]},
            {"input_channels": 7},
            {"input_channels": -1, "scale_wanted": False},
            {"input_channels": 2**62, "scale_wanted": False},
            {"dim": 4},
            {"dim": -3},
        ):
            with pytest.raises(RuntimeError):
                backward(**fits | wrong)
        # No such layout: channels at the end are innermost.
        tokens, grad_output = input.movedim(1, 3), fits["grad_output"].movedim(1, 3)
        for gradient, other in zip(
            backward(**fits | dict(input=tokens, grad_output=grad_output, dim=3)),
            backward(**fits),
            strict=True,
        ):
            assert torch.equal(gradient, other.movedim(1, 3) if other.dim() == 4 else other)


@pytest.mark.parametrize("device", ON_DEVICES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_strided_index_and_scale(device, per_sample):
    with operator_checks.target(NAME, device):
        (input, scale), index = arguments((2, 6, 5, 7), 8, per_sample=per_sample, device=device)
        call_cut = call(index=index[..., ::2])
        operator_checks.check_accuracy(call_cut, (input, scale[..., ::2]), FP32_LIMIT)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_another_backend_asked_for_is_not_passed_over(name):
    (input, scale), index = arguments((2, 6, 5, 7), 9)
    vfmk.ops.channel_remap(input, index, scale)
    with vfmk.use_backend(name):
        assert vfmk._backends.native_kernel(NAME, "forward", input) is None
        if vfmk.backends()[NAME][name]:
            with pytest.raises(vfmk.BackendError):
                vfmk.ops.channel_remap(input, index, scale)
        else:
            vfmk.ops.channel_remap(input, index, scale)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_native_library_asked_for_runs_or_says_why_not(name):
    (input, scale), index = arguments((2, 6, 5, 7), 9)
    with vfmk.use_backend(name):
        for dtype in (torch.float64, torch.float32):
            args = input.to(dtype), index, scale.to(dtype)
            if name == "cpu" and dtype == torch.float32 and not vfmk.backends()[NAME][name]:
                vfmk.ops.channel_remap(*args)
                continue
            with pytest.raises(vfmk.BackendError, match=f"'{name}' cannot run this call\n  {name}"):
                vfmk.ops.channel_remap(*args)
            with pytest.raises(TypeError, match="index must be int64"):  # before any backend
                vfmk.ops.channel_remap(input, index.int(), scale)


def test_an_index_that_changed_in_between_reads_nothing_outside():
    with operator_checks.target(NAME, "cpu"):
        (input, scale), index = arguments((2, 6, 5, 7), 9)
        output = vfmk.ops.channel_remap(input.requires_grad_(), index, scale)
        index.data[3] = 600
        with pytest.raises(IndexError, match="index holds 600, input has 6 channels"):
            output.sum().backward()


def test_meta_tensors():
    output = vfmk.ops.channel_remap(INPUT.to("meta"), INDEX.to("meta"))
    assert output.shape == INPUT.shape


def test_cuda_graph(device):
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    args, index = arguments((2, 16, 20, 20), 16, device=device)
    expected = call(index=index)(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(index=index)(*args)
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_index_out_of_range(device, layout):
    (input, scale), _ = arguments((2, 4, 5, 6), 3, device=device, layout=layout)
    for bad in (-1, 4, 2**40):
        index = torch.tensor([0, bad, 3], device=device)
        if device == "cpu":
            with pytest.raises(IndexError, match=f"^{NAME}: index holds {bad}, input has 4 chan"):
                vfmk.ops.channel_remap(input, index, scale)
            continue
        output, grad_input, grad_scale = operator_checks.value_and_gradients(
            call(index=index), (input, scale)
        )
        assert output[:, 1].isnan().all()
        assert output[:, [0, 2]].isfinite().all()
        assert grad_input.isfinite().all()
        assert not grad_input[:, 1:3].any()
        assert grad_scale.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("per_sample", [False, True])
def test_reference_where_nobody_looks_at_the_index(per_sample, monkeypatch):
    """As on CUDA: nothing outside is read, NaN comes out."""
    module = importlib.import_module("vfmk.reference.channel_remap")
    monkeypatch.setattr(
        module, "positions", lambda operator, index, channels: without_outside(index, channels)
    )
    (input, scale), index = arguments((2, 4, 5, 6), 3, per_sample=per_sample)
    input[:, 0] = torch.inf  # what an index outside must not read by accident
    index[..., 0], index[..., 1], index[..., 2] = 3, -1, 2**40
    scale[..., 1] = torch.inf
    with vfmk.use_backend("reference"):
        output, grad_input, grad_scale = operator_checks.value_and_gradients(
            call(index=index), (input, scale)
        )
    assert output[:, 1:].isnan().all()
    assert output[:, 0].isfinite().all()
    assert grad_input[:, 3].all()
    assert not grad_input[:, :3].any()
    assert (
        grad_scale.isnan().tolist()
        == torch.tensor([False, True, True]).expand(grad_scale.shape).tolist()
    )


def test_reference_of_no_channels_where_nobody_looks(monkeypatch):
    """All that is read lies outside."""
    module = importlib.import_module("vfmk.reference.channel_remap")
    monkeypatch.setattr(
        module, "positions", lambda operator, index, channels: without_outside(index, channels)
    )
    arguments = torch.zeros(2, 0, 3, 3), torch.ones(2)
    with vfmk.use_backend("reference"):
        output, grad_input, grad_scale = operator_checks.value_and_gradients(
            call(index=torch.tensor([0, 1])), arguments
        )
    assert output.shape == (2, 2, 3, 3)
    assert output.isnan().all()
    assert grad_scale.isnan().all()
    assert grad_input.shape == (2, 0, 3, 3)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_kernels_of_every_backend_are_called_alike(backend):
    """So that a backend may change between the choice of one and its call."""
    input, scale, index = torch.randn(2, 4, 5, 6), torch.randn(3), torch.tensor([2, 0, 2])
    with vfmk.use_backend(backend):
        forward, backward = (_backends.kernel(NAME, name, input) for name in _backends.BOTH)
    output = forward(input, index, scale, 1)
    torch.testing.assert_close(output, vfmk.reference.channel_remap(input, index, scale))
    grad_input, grad_scale = backward(
        torch.ones_like(output), input, index, scale, 4, 1, False, True, True
    )
    expected = torch.stack([scale[1], torch.tensor(0.0), scale[0] + scale[2], torch.tensor(0.0)])
    torch.testing.assert_close(grad_input[0, :, 0, 0], expected)
    torch.testing.assert_close(grad_scale, input.sum((0, 2, 3))[index])


def test_gradients_that_nobody_wants_are_tensors_of_their_own():
    operator = torch.ops.vfmk.channel_remap_backward.default
    args = (INPUT[:, :3], None, INDEX[:3], None, 4, 1, False, [False, False])
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


def test_wrong_arguments_past_the_function_are_named():
    with pytest.raises(TypeError, match=f"{NAME}: index must be int64, got int32"):
        torch.ops.vfmk.channel_remap(INPUT, INDEX.int(), None, 1)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match=f"{NAME}: input and scale differ in dtype"),
    ):
        torch.ops.vfmk.channel_remap(INPUT.bfloat16(), INDEX, SCALE, 1)


INPUT, INDEX, SCALE = torch.zeros(2, 4, 5, 6), torch.zeros(4, dtype=torch.int64), torch.zeros(4)
BAD_INPUT = [  # arguments, keyword arguments, exception, message
    ((None, INDEX), {}, TypeError, r"input must be a Tensor \[..., C, ...\], got NoneType"),
    ((INPUT.int(), INDEX), {}, TypeError, "input must be float32.*got int32"),
    ((torch.quantize_per_tensor(INPUT, 1, 0, torch.qint8), INDEX), {}, TypeError, "got qint8"),
    ((INPUT, [0, 1]), {}, TypeError, r"index must be a Tensor \[C'\] or \[B, C'\], got list"),
    ((INPUT, INDEX.int()), {}, TypeError, "index must be int64, got int32"),
    ((INPUT, INDEX[None, None]), {}, ValueError, r"index must have the shape \[C'\] or \[B, C'\]"),
    ((INPUT, INDEX[None]), {}, ValueError, "index has a batch of 1, expected 2"),
    ((INPUT, INDEX.to("meta")), {}, ValueError, "index is on meta, input is on cpu"),
    ((INPUT, INDEX[None]), {"dim": 0}, ValueError, r"index \[1, 4\] is per sample, but dim is 0"),
    ((INPUT, INDEX, SCALE[None]), {}, ValueError, r"scale must have the shape \[C'\], got"),
    ((INPUT, INDEX, SCALE[:3]), {}, ValueError, r"scale has the shape \[3\], index has \[4\]"),
    ((INPUT, INDEX, SCALE.double()), {}, TypeError, "scale is float64, input is float32"),
    ((INPUT, INDEX, SCALE.to("meta")), {}, ValueError, "scale is on meta, input is on cpu"),
    ((INPUT, INDEX, 2.0), {}, TypeError, r"scale must be a Tensor \[C'\], got float"),
    ((INPUT, INDEX), {"dim": 4}, ValueError, r"dim must be a dimension of input \[2, 4, 5, 6\]"),
    ((INPUT, INDEX), {"dim": -5}, ValueError, "dim must be a dimension of input"),
    ((INPUT[0, 0, 0, 0], INDEX), {"dim": 0}, ValueError, r"dim must be a dimension of input \[\]"),
    ((INPUT, INDEX), {"dim": True}, TypeError, "dim must be an int, got True"),
    ((INPUT, INDEX), {"dim": "C"}, TypeError, "dim must be an int, got 'C'"),
]


@pytest.mark.parametrize(("args", "kwargs", "exception", "message"), BAD_INPUT)
def test_bad_input(args, kwargs, exception, message):
    with pytest.raises(exception, match=f"^{NAME}: .*{message}"):
        vfmk.ops.channel_remap(*args, **kwargs)
