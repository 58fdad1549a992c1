"""Dense convolution whose kernels differ from sample to sample."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from vfmk import _backends
from vfmk.ops import _contract, _convolution

NAME = "dynamic_conv2d"


def dynamic_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int | tuple[int, int] | str = "same",
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """Convolve sample b with the kernels weight[b], at stride 1.

    Differentiable, once, in input, weight and bias. Sums are fp32 (fp64 for float64 input), and the
    bits are the same on each run. No copy of the input for each kernel position is made in memory.
    Works under autocast, torch.compile and torch.export.

    Args:
        input: [B, C, H, W], float32, float16, bfloat16 or float64. Contiguous, channels-last, or a
            view in which columns or else channels are dense is read in place; any other view is
            copied first.
        weight: [B, O, C, kh, kw], or [1, O, C, kh, kw] for one set of kernels, of input's dtype.
            Any kh, kw ≥ 1.
        bias: [B, O] or [1, O], of input's dtype.
        padding: zeros around the input: "same" keeps H and W; an int, or (vertical, horizontal).
        dilation: distance between kernel positions: an int, or (vertical, horizontal).

    Returns:
        [B, O, H', W'] in input's dtype and memory format; H' = H + 2·padding − dilation·(kh − 1).

    Raises:
        TypeError: an argument that is no tensor, or of another dtype.
        ValueError: shapes or devices that do not fit, or a kernel larger than the padded input.

    Equivalent to (here for padding="same" and odd kernels)::

        B, C, H, W = input.shape
        output = torch.nn.functional.conv2d(
            input.reshape(1, B * C, H, W),
            weight.expand(B, -1, -1, -1, -1).flatten(0, 1),
            groups=B, padding="same", dilation=dilation,
        ).reshape(B, O, H, W) + bias[:, :, None, None]

    Source: VFM-Adapter (AAAI 2025), the convolution of the authors' released variant; also the
    operator of dynamic filter networks.
    """
    _contract.check_tensor(NAME, "input", input, "B, C, H, W")
    _contract.check_tensor(NAME, "weight", weight, "B or 1, O, C, kh, kw")
    if bias is not None:
        _contract.check_tensor(NAME, "bias", bias, "B or 1, O")
    _contract.check_alike(NAME, input, weight=weight, bias=bias)
    if weight.shape[2] != input.shape[1]:
        raise ValueError(
            f"{NAME}: weight takes {weight.shape[2]} channels, input has {input.shape[1]}"
        )
    if bias is not None and bias.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{NAME}: bias has {bias.shape[1]} channels, weight makes {weight.shape[1]}"
        )
    _convolution.check_batch(NAME, input, weight=weight, bias=bias)
    sides, steps = _convolution.checked_geometry(NAME, input, weight, padding, dilation)
    input, weight, bias = _contract.autocast(input, weight, bias)  # type: ignore[assignment]
    return torch.ops.vfmk.dynamic_conv2d(input, weight, bias, sides, steps)


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
    _backends.kernel(NAME, "forward", input, weight, padding)(*arguments)
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
    return _convolution.empty((input.shape[0], weight.shape[1], *size), input)


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
    _backends.kernel(NAME, "backward", input, weight, padding)(*arguments)
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
    gradients = torch.ops.vfmk.dynamic_conv2d_backward(
        grad_output, *ctx.saved_tensors, ctx.padding, ctx.dilation, wanted
    )
    return (
        *_contract.if_wanted(gradients, wanted),
        None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _not_supported(device: str, input: Tensor, weight: Tensor, padding: Sequence[int]) -> str:
    return _convolution.not_supported(device, input, padding)


def _not_supported_by_triton(input: Tensor, weight: Tensor, padding: Sequence[int]) -> str:
    device = "cpu" if _backends.interpreted() else "cuda"
    if reason := _convolution.not_supported(device, input, padding):
        return reason
    from vfmk.kernels import dynamic_conv2d as kernels

    return kernels.not_supported(input, weight, padding)


_backends.register(
    NAME,
    {
        "triton": _backends.module(f"vfmk.kernels.{NAME}", _not_supported_by_triton),
        "cpu": _backends.native(NAME, functools.partial(_not_supported, "cpu")),
        "reference": _backends.module(f"vfmk.reference.{NAME}", lambda *args: ""),
    },
)
