"""Depthwise convolution whose kernels differ from sample to sample."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from vfmk import _backends
from vfmk.ops import _contract
from vfmk.reference.padding import resolve_padding

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
    sides, steps = _checked_geometry(input, weight, bias, padding, dilation)
    input, weight, bias = _contract.autocast(input, weight, bias)  # type: ignore[assignment]
    return torch.ops.vfmk.dynamic_depthwise_conv2d(input, weight, bias, sides, steps)


def _checked_geometry(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int | tuple[int, int] | str,
    dilation: int | tuple[int, int],
) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """Padding as (top, bottom, left, right) and dilation as (vertical, horizontal)."""
    batch, channels, height, width = input.shape
    for argument, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is None:
            continue
        if tensor.shape[1] != channels:
            raise ValueError(
                f"{NAME}: {argument} has {tensor.shape[1]} channels, input has {channels}"
            )
        if tensor.shape[0] not in (1, batch):
            raise ValueError(
                f"{NAME}: {argument} has a batch of {tensor.shape[0]}, expected {batch} or 1"
            )
    kernel_size = (weight.shape[2], weight.shape[3])
    if min(kernel_size) < 1:
        raise ValueError(f"{NAME}: weight has an empty kernel, {list(weight.shape)}")
    steps = _contract.int_pair(NAME, "dilation", dilation, minimum=1)
    if isinstance(padding, str):
        if padding != "same":
            raise ValueError(f'{NAME}: padding must be "same" or ints, got {padding!r}')
    else:
        padding = _contract.int_pair(NAME, "padding", padding, minimum=0)
    sides = resolve_padding(padding, kernel_size, steps)
    if min(_output_size(input, weight, sides, steps)) < min(1, height, width):
        raise ValueError(
            f"{NAME}: weight {list(weight.shape)} with dilation {steps} does not fit into input"
            f" {list(input.shape)} with padding {padding}"
        )
    return sides, steps


def _output_size(
    input: Tensor, weight: Tensor, padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    top, bottom, left, right = padding
    height = input.shape[2] + top + bottom - dilation[0] * (weight.shape[2] - 1)
    width = input.shape[3] + left + right - dilation[1] * (weight.shape[3] - 1)
    return height, width


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
        _readable(input),
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
    size = (*input.shape[:2], *_output_size(input, weight, padding, dilation))
    return _empty(size, input)


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
        grad_output.contiguous(memory_format=_layout(input)),
        _readable(input),
        weight.contiguous(),
        padding,
        dilation,
        *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)),
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
    return (
        _empty(input.shape, input) if wanted[0] else input.new_empty(0),
        weight.new_empty(weight.shape if wanted[1] else 0),
        input.new_empty(0) if bias is None or not wanted[2] else bias.new_empty(bias.shape),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, weight, bias, ctx.padding, ctx.dilation = inputs
    ctx.save_for_backward(input, weight, bias)


def _gradients(ctx, grad_output: Tensor):  # type: ignore[no-untyped-def]
    wanted = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.vfmk.dynamic_depthwise_conv2d_backward(
        grad_output, *ctx.saved_tensors, ctx.padding, ctx.dilation, wanted
    )
    return (
        *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)),
        None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _readable(input: Tensor) -> Tensor:
    """The kernels read any view in which columns or channels are dense; of others, a copy."""
    return input if 1 in (input.stride(3), input.stride(1)) else input.contiguous()


def _layout(input: Tensor) -> torch.memory_format:
    """The layout of every result, by the rule that each backend goes by: dense columns first."""
    dense_columns = input.stride(3) == 1 or input.stride(1) != 1
    return torch.contiguous_format if dense_columns else torch.channels_last


def _empty(size: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=_layout(like))


def _not_supported(device: str, input: Tensor, padding: Sequence[int]) -> str:
    if input.device.type != device:
        return f"input is on {input.device}"
    return "float64 has the reference alone" if input.dtype == torch.float64 else ""


def _not_supported_by_triton(input: Tensor, padding: Sequence[int]) -> str:
    device = "cpu" if _backends.interpreted() else "cuda"
    if reason := _not_supported(device, input, padding):
        return reason
    from vfmk.kernels import dynamic_depthwise_conv2d as kernels

    return kernels.not_supported(input, padding)


_backends.register(
    NAME,
    {
        "cuda": _backends.native(NAME, functools.partial(_not_supported, "cuda")),
        "triton": _backends.module(f"vfmk.kernels.{NAME}", _not_supported_by_triton),
        "cpu": _backends.native(NAME, functools.partial(_not_supported, "cpu")),
        "reference": _backends.module(f"vfmk.reference.{NAME}", lambda input, padding: ""),
    },
)
