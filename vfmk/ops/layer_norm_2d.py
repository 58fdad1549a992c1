"""Layer norm over the channels of an image, and a gather of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vfmk import _backends
from vfmk.ops import _contract, _implementations, _operator
from vfmk.reference.sums import dtype_of_sums

NAME = "layer_norm_2d"


def layer_norm_2d(
    input: Tensor, weight: Tensor, bias: Tensor, index: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """Normalize each place over its channels; with `index`, write channel index[c] as channel c.

    The gather is part of the write, so a channel has the same bits wherever it goes.
    Differentiable, once, in input, weight and bias. Sums are fp32 (fp64 for float64), variance is
    taken about the mean, readers of one channel are added up in ascending order: the same bits on
    each run. Works under torch.compile and torch.export, and under autocast, where it casts to
    float32 as PyTorch's `layer_norm` does. float64 runs in plain PyTorch, whose sums on CUDA may
    differ from run to run.

    Args:
        input: [B, C, H, W], float32, float16, bfloat16 or float64, C at least 1. Read in place if
            columns or channels are dense, whatever the other strides; else copied first.
        weight, bias: [C] of input's dtype.
        index: int64 [C'], each in 0 ... C − 1, as often as it pleases; None for all in order.
        eps: added to the variance.

    Returns:
        [B, C', H, W] in input's dtype and memory format: channels-last where channels are dense in
        the input and columns are not, else contiguous.

    Raises:
        TypeError: an argument that is no tensor, or of another dtype; eps that is no number.
        ValueError: shapes or devices that do not fit.
        IndexError: an index outside 0 ... C − 1, on the CPU. On CUDA to look would stop the
            stream: nothing outside the input is read, and the channel becomes NaN.

    Equivalent to::

        mean = input.mean(1, keepdim=True)
        variance = (input - mean).square().mean(1, keepdim=True)
        normalized = (input - mean) / torch.sqrt(variance + eps)
        output = weight[:, None, None] * normalized + bias[:, None, None]
        output = output if index is None else output[:, index]

    Source: segment_anything's LayerNorm2d; the index, parameter-free fine-tuning of SAM.
    """
    _contract.check_tensor(NAME, "input", input, "B, C, H, W")
    channels = input.shape[1]
    if channels < 1:
        raise ValueError(f"{NAME}: input has no channels, {list(input.shape)}")
    for argument, parameter in {"weight": weight, "bias": bias}.items():
        _contract.check_tensor(NAME, argument, parameter, "C")
        if parameter.shape[0] != channels:
            raise ValueError(
                f"{NAME}: {argument} is for {parameter.shape[0]} channels, input has {channels}"
            )
    _contract.check_alike(NAME, input, weight=weight, bias=bias)
    if index is not None:
        _contract.check_index(NAME, input, index, "[C']", 1)
    eps = _contract.as_float(NAME, "eps", eps)
    input, weight, bias = _contract.autocast(input, weight, bias, dtype=torch.float32)  # type: ignore[assignment]
    return _forward(input, weight, bias, index, eps)[0]


@_operator.define(NAME)
def _forward(
    input: Tensor, weight: Tensor, bias: Tensor, index: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    output, mean, rstd = _empty_output(input, weight, bias, index, eps)
    channels_last = _channels_last(input)
    _backends.kernel(NAME, "forward", input)(
        *(
            _dense_innermost(input, channels_last),
            weight.contiguous(),
            bias.contiguous(),
            _dense(index),
        ),
        *(eps, channels_last, output, mean, rstd),
    )
    return output, mean, rstd


@_forward.register_fake
def _empty_output(
    input: Tensor, weight: Tensor, bias: Tensor, index: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and for backward mean and 1 / sqrt(variance + eps): [B, H, W]."""
    batch, channels, *size = input.shape
    outputs = channels if index is None else index.shape[0]
    dtype = dtype_of_sums(input)
    return (
        _empty((batch, outputs, *size), input, _channels_last(input)),
        input.new_empty((batch, *size), dtype=dtype),
        input.new_empty((batch, *size), dtype=dtype),
    )


@_operator.define(f"{NAME}_backward")
def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    index: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(grad_output, input, weight, index, mean, rstd, wanted)
    channels_last = _channels_last(input)
    _backends.kernel(NAME, "backward", input)(
        grad_output.contiguous(memory_format=_format(channels_last)),
        *(_dense_innermost(input, channels_last), weight.contiguous(), _dense(index), mean, rstd),
        *(channels_last, *_contract.if_wanted(gradients, wanted)),
    )
    return gradients


@_backward.register_fake
def _empty_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    index: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """A tensor for each gradient, empty ([0]) for those that nobody wants."""
    grad_input = (
        _empty(input.shape, input, _channels_last(input)) if wanted[0] else input.new_empty(0)
    )
    grad_weight, grad_bias = _contract.empty_gradients((weight, weight), wanted[1:])
    return grad_input, grad_weight, grad_bias


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, weight, _, index, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(input, weight, index, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _gradients(ctx, grad_output: Tensor, *_: Tensor | None):  # type: ignore[no-untyped-def]
    wanted = list(ctx.needs_input_grad[:3])
    gradients = _backward(grad_output, *ctx.saved_tensors, wanted)
    return *_contract.if_wanted(gradients, wanted), None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _channels_last(input: Tensor) -> bool:
    """The layout of every result, by the rule that each backend goes by: dense columns first."""
    return input.stride(1) == 1 and input.stride(3) != 1


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _empty(size: Sequence[int], like: Tensor, channels_last: bool) -> Tensor:
    return torch.empty(
        size, dtype=like.dtype, device=like.device, memory_format=_format(channels_last)
    )


def _dense_innermost(input: Tensor, channels_last: bool) -> Tensor:
    """In columns, or in channels if those are last: itself, or a copy."""
    return input if channels_last else _contract.dense_last(input)


def _dense(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()


_implementations.register(NAME)
