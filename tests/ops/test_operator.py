"""Operators by the short way and by PyTorch's dispatcher: the same, and each where it belongs."""

import sys

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

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


def test_plain_calls_do_not_pass_the_dispatcher(monkeypatch):
    """Else the test above compares the long way with itself."""
    module = sys.modules["vfmk.ops.layer_norm_2d"]
    for operator in (module._forward, module._backward):
        monkeypatch.setattr(operator, "_overload", None)
    args = CALLS["layer_norm_2d"][1]
    value_and_gradients(vfmk.ops.layer_norm_2d, args)
    with Seen(), pytest.raises(TypeError, match="'NoneType' object is not callable"):
        vfmk.ops.layer_norm_2d(*args)


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
