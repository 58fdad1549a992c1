"""Channels read in another order, and scaled."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vfmk import _backends
from vfmk.ops import _contract, _implementations, _operator

NAME = "channel_remap"


def channel_remap(
    input: Tensor, index: Tensor, scale: Tensor | None = None, *, dim: int = 1
) -> Tensor:
    """Put channel index[c] of the input, times scale[c], into channel c of the output.

    Differentiable, once, in input and scale. The gradient of a channel that several outputs read is
    their sum in ascending order, in fp32: the same bits on each run. float64 runs in plain PyTorch,
    whose sums on CUDA may differ from run to run. Works under autocast (which casts input and
    scale, if there is a scale), torch.compile and torch.export.

    Args:
        input: [..., C, ...], float32, float16, bfloat16 or float64, channels in dimension `dim`.
            Contiguous, channels-last, or a view of either cut in rows, columns or channels is read
            in place; any other view is copied first.
        index: int64, [C'] or, for a map for each sample, [B, C'], with B the size of input's first
            dimension. Each in 0 ... C − 1, as often as it pleases.
        scale: of index's shape and input's dtype.
        dim: the dimension of the channels; negative counts from the end.

    Returns:
        [..., C', ...] in input's dtype and memory format: channels innermost where they are in the
        input and its last dimension is not, else contiguous.

    Raises:
        TypeError: an argument that is no tensor, or of another dtype.
        ValueError: shapes, devices or a dimension that do not fit.
        IndexError: an index outside 0 ... C − 1, on the CPU. On CUDA to look would stop the
            stream: nothing outside the input is read, the channel becomes NaN, and so does the
            gradient of its scale.

    Equivalent to (here for dim=1)::

        if index.dim() == 1:
            output = input[:, index]
        else:
            output = torch.stack([sample[i] for sample, i in zip(input, index)])
        output = output * scale.view(-1, C', 1, 1)

    Source: parameter-free fine-tuning of SAM, which overwrites redundant feature channels with
    useful ones.
    """
    if (output := _at_once(input, index, scale, dim)) is not None:
        return output
    dim = _checked_dim(input, index, scale, dim)
    if scale is not None:
        input, scale = _contract.autocast(input, scale)  # type: ignore[assignment]
    return _forward(input, index, scale, dim)


def _at_once(input: Any, index: Any, scale: Any, dim: Any) -> Tensor | None:
    """From one call of the native library, which checks, allocates and computes; None if there is
    more to do: a gradient, another backend, or a word on what is wrong.

    That call passes the dispatcher, so that fewer tensors are special than in an `Operator`."""
    plain = _operator.PLAIN_TYPES
    if (
        _operator.is_watched()
        or torch._C._is_any_autocast_enabled()
        or type(dim) is not int
        or type(input) not in plain
        or type(index) not in plain
        or not (input.is_cpu or input.is_cuda)
        or not (index.is_cpu or index.is_cuda)
        or not input.dtype.is_floating_point
        or torch._C._functorch.is_legacy_batchedtensor(input)
        or _operator.needs_gradient(input, scale)
    ):
        return None
    if scale is not None and (
        type(scale) not in plain
        or not (scale.is_cpu or scale.is_cuda)
        or scale.dtype is not input.dtype
    ):
        return None
    native = _backends.native_kernel(NAME, "forward", input)
    return None if native is None else native(input, index, scale, dim)


def _checked_dim(input: Tensor, index: Tensor, scale: Tensor | None, dim: int) -> int:
    """`dim` counted from the front, if the arguments are right."""
    _contract.check_tensor(NAME, "input", input, "..., C, ...")
    _contract.check_int(NAME, "dim", dim)
    if not -input.dim() <= dim < input.dim():
        raise ValueError(f"{NAME}: dim must be a dimension of input {list(input.shape)}, got {dim}")
    dim %= input.dim()
    _contract.check_index(NAME, input, index, "[C'] or [B, C']", 1, 2)
    if index.dim() == 2 and dim == 0:
        raise ValueError(f"{NAME}: index {list(index.shape)} is per sample, but dim is 0")
    if index.dim() == 2 and index.shape[0] != input.shape[0]:
        raise ValueError(
            f"{NAME}: index has a batch of {index.shape[0]}, expected {input.shape[0]}"
        )
    if scale is not None:
        _contract.check_tensor(NAME, "scale", scale, "B, C'" if index.dim() == 2 else "C'")
        if scale.shape != index.shape:
            raise ValueError(
                f"{NAME}: scale has the shape {list(scale.shape)}, index has {list(index.shape)}"
            )
        _contract.check_alike(NAME, input, scale=scale)
    return dim


def _kernel(name: str, tensor: Tensor) -> Callable[..., Any]:
    return _backends.native_kernel(NAME, name, tensor) or _backends.kernel(NAME, name, tensor)


@_operator.define(NAME)
def _forward(input: Tensor, index: Tensor, scale: Tensor | None, dim: int) -> Tensor:
    output: Tensor | None = _kernel("forward", input)(input, index, scale, dim)
    if output is None:  # called past `channel_remap`, with arguments that are wrong
        _checked_dim(input, index, scale, dim)
        raise RuntimeError(f"{NAME}: input and scale differ in dtype")
    return output


@_forward.register_fake
def _empty_output(input: Tensor, index: Tensor, scale: Tensor | None, dim: int) -> Tensor:
    size = list(input.shape)
    size[dim] = index.shape[-1]
    return _empty(size, input, dim, _channels_last(input, dim))


@_operator.define(f"{NAME}_backward")
def _backward(
    grad_output: Tensor,
    input: Tensor | None,
    index: Tensor,
    scale: Tensor | None,
    input_channels: int,
    dim: int,
    channels_last: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = _kernel("backward", grad_output)(
        grad_output, input, index, scale, input_channels, dim, channels_last, *wanted
    )
    return gradients


@_backward.register_fake
def _empty_gradients(
    grad_output: Tensor,
    input: Tensor | None,
    index: Tensor,
    scale: Tensor | None,
    input_channels: int,
    dim: int,
    channels_last: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """A tensor for each gradient, empty ([0]) for those that nobody wants."""
    size = [*grad_output.shape[:dim], input_channels, *grad_output.shape[dim + 1 :]]
    return (
        _empty(size, grad_output, dim, channels_last) if wanted[0] else grad_output.new_empty(0),
        grad_output.new_empty(index.shape if wanted[1] else 0),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, index, scale, ctx.dim = inputs
    needed = scale is not None and scale.requires_grad
    ctx.save_for_backward(input if needed else None, index, scale)
    ctx.input_channels = input.shape[ctx.dim]
    ctx.channels_last = _channels_last(input, ctx.dim)


def _gradients(ctx, grad_output: Tensor):  # type: ignore[no-untyped-def]
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    grad_input, grad_scale = _backward(
        grad_output, *ctx.saved_tensors, ctx.input_channels, ctx.dim, ctx.channels_last, wanted
    )
    return (grad_input if wanted[0] else None, None, grad_scale if wanted[1] else None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _channels_last(input: Tensor, dim: int) -> bool:
    """The layout of every result, by the rule that each backend goes by: dense columns first."""
    last = input.dim() - 1
    return dim == last or (input.stride(dim) == 1 and input.stride(last) != 1)


def _empty(size: Sequence[int], like: Tensor, dim: int, channels_last: bool) -> Tensor:
    if not channels_last:
        return like.new_empty(size)
    innermost = [*size[:dim], *size[dim + 1 :], size[dim]]
    return like.new_empty(innermost).movedim(-1, dim)


def _in_layout(tensor: Tensor, dim: int, channels_last: bool) -> Tensor:
    """Dense: itself, or a copy."""
    if channels_last:
        return tensor.movedim(dim, -1).contiguous().movedim(-1, dim)
    return tensor.contiguous()


def _planes(tensor: Tensor, dim: int, per_sample: bool, channels_last: bool) -> Tensor:
    """[N, C, rows, columns] with dense columns, or channels if those are last: a view where the
    strides allow one, or a copy."""
    view = tensor if tensor.dim() == 4 and dim == 1 else _split(tensor, dim, per_sample)
    innermost = 1 if channels_last else 3
    if view.stride(innermost) == 1 or view.shape[innermost] == 1:
        return view
    return _split(_in_layout(tensor, dim, channels_last), dim, per_sample)


def _split(tensor: Tensor, dim: int, per_sample: bool) -> Tensor:
    before, channels, after = tensor.shape[:dim], tensor.shape[dim], tensor.shape[dim + 1 :]
    if after:
        return tensor.reshape(before.numel(), channels, after[:-1].numel(), after[-1])
    samples = before[0] if per_sample else 1
    pixels = before[1:].numel() if per_sample else before.numel()
    return tensor.reshape(samples, 1, pixels, channels).permute(0, 3, 1, 2)


def _maps(tensor: Tensor | None) -> Tensor | None:
    """index or scale as [maps, C']."""
    if tensor is None:
        return None
    return (tensor if tensor.dim() == 2 else tensor[None]).contiguous()


def _forward_on_planes(
    kernel: Callable[..., None], input: Tensor, index: Tensor, scale: Tensor | None, dim: int
) -> Tensor:
    """As the native library's `channel_remap_forward`, for arguments that fit."""
    output, channels_last = _empty_output(input, index, scale, dim), _channels_last(input, dim)
    per_sample = index.dim() == 2
    kernel(
        _planes(input, dim, per_sample, channels_last),
        *(_maps(index), _maps(scale), channels_last),
        _planes(output, dim, per_sample, channels_last),
    )
    return output


def _backward_on_planes(
    kernel: Callable[..., None],
    grad_output: Tensor,
    input: Tensor | None,
    index: Tensor,
    scale: Tensor | None,
    input_channels: int,
    dim: int,
    channels_last: bool,
    *wanted: bool,
) -> tuple[Tensor, Tensor]:
    """As the native library's `channel_remap_backward`, for arguments that fit."""
    gradients = _empty_gradients(
        grad_output, input, index, scale, input_channels, dim, channels_last, wanted
    )
    planes = functools.partial(
        _planes, dim=dim, per_sample=index.dim() == 2, channels_last=channels_last
    )
    kernel(
        planes(_in_layout(grad_output, dim, channels_last)),
        planes(input) if wanted[1] and input is not None else None,
        *(_maps(index), _maps(scale), input_channels, channels_last),
        planes(gradients[0]) if wanted[0] else None,
        _maps(gradients[1]) if wanted[1] else None,
    )
    return gradients


_implementations.register(
    NAME,
    native=("cuda", "cpu"),
    adapters={"forward": _forward_on_planes, "backward": _backward_on_planes},
)
