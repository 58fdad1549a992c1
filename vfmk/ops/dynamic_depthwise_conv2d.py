"""Depthwise convolution whose kernels differ from sample to sample."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from vfmk import _backends
from vfmk.ops import _contract, _convolution

NAME = "dynamic_depthwise_conv2d"


def dynamic_depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int | tuple[int, int] | str = "same",
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """Convolve channel c of sample b with the kernel weight[b, c], at stride 1.

    Differentiable, once, in input, weight and bias. Sums are fp32 (fp64 for float64 input), and the
    bits are the same on each run. Works under autocast, torch.compile and torch.export. On CUDA, in
    half precision, an infinity or NaN in the input reaches outputs up to 11 columns away: tensor
    cores multiply it by zero.

    Args:
        input: [B, C, H, W], float32, float16, bfloat16 or float64. Contiguous, channels-last, or a
            view in which columns or else channels are dense is read in place; any other view is
            copied first.
        weight: [B, C, kh, kw], or [1, C, kh, kw] for one set of kernels, of input's dtype. Any
            kh, kw ≥ 1; 3×3, 5×5 and 7×7 without dilation are the fast ones.
        bias: [B, C] or [1, C], of input's dtype.
        padding: zeros around the input: "same" keeps H and W; an int, or (vertical, horizontal).
        dilation: distance between kernel positions: an int, or (vertical, horizontal).

    Returns:
        [B, C, H', W'] in input's dtype and memory format; H' = H + 2·padding − dilation·(kh − 1).

    Raises:
        TypeError: an argument that is no tensor, or of another dtype.
        ValueError: shapes or devices that do not fit, or a kernel larger than the padded input.

    Equivalent to (here for padding="same" and odd kernels)::

        B, C, H, W = input.shape
        output = torch.nn.functional.conv2d(
            input.reshape(1, B * C, H, W),
            weight.expand(B, -1, -1, -1).reshape(B * C, 1, kh, kw),
            groups=B * C, padding="same", dilation=dilation,
        ).reshape(B, C, H, W) + bias[:, :, None, None]

    Source: VFM-Adapter (AAAI 2025), the local branch of hybrid operation mapping; also the
    operator of dynamic filter networks.
    """
    _contract.check_tensor(NAME, "input", input, "B, C, H, W")
    _contract.check_tensor(NAME, "weight", weight, "B or 1, C, kh, kw")
    if bias is not None:
        _contract.check_tensor(NAME, "bias", bias, "B or 1, C")
    _contract.check_alike(NAME, input, weight=weight, bias=bias)
    _check_channels(input, weight=weight, bias=bias)
    _convolution.check_batch(NAME, input, weight=weight, bias=bias)
    sides, steps = _convolution.checked_geometry(NAME, input, weight, padding, dilation)
    input, weight, bias = _contract.autocast(input, weight, bias)  # type: ignore[assignment]
    return torch.ops.vfmk.dynamic_depthwise_conv2d(input, weight, bias, sides, steps)


def _check_channels(input: Tensor, **others: Tensor | None) -> None:
    channels = input.shape[1]
    for argument, other in others.items():
        if other is not None and other.shape[1] != channels:
            raise ValueError(
                f"{NAME}: {argument} has {other.shape[1]} channels, input has {channels}"
            )


@torch.library.custom_op(f"vfmk::{NAME}", mutates_args=())
def _forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    output = _empty_output(input, weight, bias, padding, dilation)
    arguments = (
        _convolution.readable(input),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        padding,
        dilation,
        output,
    )
    _backends.kernel(NAME, "forward", input, padding)(*arguments)
    return output


@_forward.register_fake
def _empty_output(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    size = _convolution.output_size(input, weight, padding, dilation)
    return _convolution.empty((*input.shape[:2], *size), input)


@torch.library.custom_op(f"vfmk::{NAME}_backward", mutates_args=())
def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    dilation: Sequence[int],
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(grad_output, input, weight, bias, padding, dilation, wanted)
    arguments = (
        grad_output.contiguous(memory_format=_convolution.layout(input)),
        _convolution.readable(input),
        weight.contiguous(),
        padding,
        dilation,
        *_contract.if_wanted(gradients, wanted),
    )
    _backends.kernel(NAME, "backward", input, padding)(*arguments)
    return gradients


@_backward.register_fake
def _empty_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    dilation: Sequence[int],
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """A tensor for each gradient, empty ([0]) for those that nobody wants."""
    return _convolution.empty_gradients(input, weight, bias, wanted)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, weight, bias, ctx.padding, ctx.dilation = inputs
    ctx.save_for_backward(input, weight, bias)


def _gradients(ctx, grad_output: Tensor):  # type: ignore[no-untyped-def]
    wanted = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.vfmk.dynamic_depthwise_conv2d_backward(
        grad_output, *ctx.saved_tensors, ctx.padding, ctx.dilation, wanted
    )
    return (
        *_contract.if_wanted(gradients, wanted),
        None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _not_supported_by_triton(input: Tensor, padding: Sequence[int]) -> str:
    device = "cpu" if _backends.interpreted() else "cuda"
    if reason := _convolution.not_supported(device, input, padding):
        return reason
    from vfmk.kernels import dynamic_depthwise_conv2d as kernels

    return kernels.not_supported(input, padding)


_backends.register(
    NAME,
    {
        "cuda": _backends.native(NAME, functools.partial(_convolution.not_supported, "cuda")),
        "triton": _backends.module(f"vfmk.kernels.{NAME}", _not_supported_by_triton),
        "cpu": _backends.native(NAME, functools.partial(_convolution.not_supported, "cpu")),
        "reference": _backends.module(f"vfmk.reference.{NAME}", lambda input, padding: ""),
    },
)
