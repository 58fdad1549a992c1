"""Operators by the short way and by PyTorch's dispatcher: the same, and each where it belongs."""

import sys

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import vfmk
from tests.operator_checks import value_and_gradients


class Seen(TorchDispatchMode):
    """The names of the operators that PyTorch's dispatcher was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Wrapped(Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise AssertionError(f"asked for {func.name()}")


def random(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def remap(input: Tensor) -> Tensor:
    return vfmk.ops.channel_remap(input, torch.tensor([2, 0, 0, 1]))


CALLS = {
    "adapter_attention": (
        vfmk.ops.adapter_attention,
        (random(2, 6, 8), random(24, 8), random(24)),
    ),
    "attention_pool": (vfmk.ops.attention_pool, (random(2, 6, 8), random(3, 8))),
    "channel_remap": (remap, (random(2, 4, 5, 6),)),
    "dynamic_conv2d": (vfmk.ops.dynamic_conv2d, (random(2, 4, 5, 6), random(2, 3, 4, 3, 3))),
    "dynamic_depthwise_conv2d": (
        vfmk.ops.dynamic_depthwise_conv2d,
        (random(2, 4, 5, 6), random(2, 4, 3, 3), random(2, 4)),
    ),
    "layer_norm_2d": (vfmk.ops.layer_norm_2d, (random(2, 4, 5, 6), random(4), random(4))),
    "rel_pos_attention": (
        lambda *args: vfmk.ops.rel_pos_attention(*args, (2, 3)),
        (random(1, 2, 6, 8), random(1, 2, 6, 8), random(1, 2, 6, 8), random(3, 8), random(5, 8)),
    ),
    "window_rel_pos_attention": (
        lambda *args: vfmk.ops.window_rel_pos_attention(*args, 2, 2),
        (random(1, 3, 4, 48), random(48), random(3, 8), random(3, 8)),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_by_either_way(name):
    call, args = CALLS[name]
    short = value_and_gradients(call, args)
    with Seen() as seen:
        long = value_and_gradients(call, args)
    assert {f"vfmk::{name}", f"vfmk::{name}_backward"} <= set(seen.names)
    assert all(torch.equal(one, other) for one, other in zip(short, long, strict=True))
    with torch.no_grad():
        assert torch.equal(call(*args), short[0])


def test_every_operator_is_held_to_it():
    assert set(CALLS) | {"mask_iou"} == set(vfmk.backends())  # mask_iou has no gradient


@pytest.mark.parametrize("name", CALLS)
def test_plain_calls_do_not_pass_the_dispatcher(name, monkeypatch):
    """Else the test above compares the long way with itself."""

    def not_here(*args):
        raise AssertionError("the long way")

    call, args = CALLS[name]
    module = sys.modules[f"vfmk.ops.{name}"]
    monkeypatch.setattr(module._forward, "_overload", not_here)
    value_and_gradients(call, args)
    with Seen(), pytest.raises(AssertionError, match="the long way"):
        call(*args)


def seen_by_function_mode(call, *args):
    names = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        call(*args)
    return names


def test_modes_see_the_operator():
    assert "vfmk.channel_remap.default" in seen_by_function_mode(remap, random(2, 4, 5, 6))
    graph = make_fx(remap, pre_dispatch=True)(random(2, 4, 5, 6))
    targets = {str(node.target) for node in graph.graph.nodes}
    assert "vfmk.channel_remap.default" in targets


@pytest.mark.parametrize("name", ["channel_remap", "layer_norm_2d"])
def test_special_tensors_are_made_plain_by_the_dispatcher(name):
    """Negative in sign alone, or zero without memory: a kernel would read what is not there."""
    call, (input, *rest) = CALLS[name]
    negative, zero = torch._neg_view(input), torch._efficientzerotensor(input.shape)
    for backend in ("cpu", "reference"):
        if vfmk.backends()[name][backend]:
            continue
        with vfmk.use_backend(backend):
            assert torch.equal(call(negative, *rest), call(negative.resolve_neg(), *rest))
            assert torch.equal(call(zero, *rest), call(torch.zeros(input.shape), *rest))
            leaf = input.clone().requires_grad_()
            output = call(leaf, *rest)
            for special in (torch._neg_view(output.detach()), output.detach() * 0 + 1):
                (found,) = torch.autograd.grad(output, leaf, special, retain_graph=True)
                plain = special.resolve_neg().clone()
                (expected,) = torch.autograd.grad(output, leaf, plain, retain_graph=True)
                assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["channel_remap", "layer_norm_2d"])
def test_batched_gradients(name):
    call, (input, *rest) = CALLS[name]
    leaf = input.clone().requires_grad_()
    output = call(leaf, *rest)
    cotangents = torch.randn((3, *output.shape), generator=torch.Generator().manual_seed(0))
    (batched,) = torch.autograd.grad(
        output, leaf, cotangents, retain_graph=True, is_grads_batched=True
    )
    for found, cotangent in zip(batched, cotangents, strict=True):
        (expected,) = torch.autograd.grad(output, leaf, cotangent, retain_graph=True)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", CALLS)
def test_checkpoint_and_inference_mode(name):
    call, args = CALLS[name]
    expected = value_and_gradients(call, args)
    for reentrant in (False, True):

        def checkpointed(*leaves, reentrant=reentrant):
            return checkpoint(call, *leaves, use_reentrant=reentrant)

        found = value_and_gradients(checkpointed, args)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with torch.inference_mode():
        assert torch.equal(call(*(arg.clone() for arg in args)), expected[0])


def test_a_profiler_sees_the_operator():
    with torch.profiler.profile() as profile:
        remap(random(2, 4, 5, 6))
    assert "vfmk::channel_remap" in {event.name for event in profile.events()}


def test_a_subclass_is_asked():
    wrapped = random(2, 4, 5, 6).as_subclass(Wrapped)
    with pytest.raises(AssertionError, match="asked for vfmk::channel_remap"):
        remap(wrapped)


def test_no_derivative_is_lost_in_silence():
    input, message = random(2, 4, 5, 6), "channel_remap: has no forward-mode derivative"
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        remap(forward_ad.make_dual(input, torch.ones_like(input)))
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(remap, (input,), (torch.ones_like(input),))
    leaf = input.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(remap(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="channel_remap_backward"):
        gradient.sum().backward()


def test_traced_as_one_operator():
    graph = str(torch.jit.trace(remap, random(2, 4, 5, 6)).graph)
    assert "vfmk::channel_remap" in graph
