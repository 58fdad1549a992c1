"""What the operators that convolve at stride 1 share: all but the public function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vfmk import _backends
from vfmk.ops import _contract, _implementations, _operator
from vfmk.reference.padding import resolve_padding


def check_batch(operator: str, input: Tensor, **others: Tensor | None) -> None:
    """Every tensor in `others` has the batch of `input`, or 1."""
    batch = input.shape[0]
    for argument, other in others.items():
        if other is not None and other.shape[0] not in (1, batch):
            raise ValueError(
                f"{operator}: {argument} has a batch of {other.shape[0]}, expected {batch} or 1"
            )


def checked_geometry(
    operator: str,
    input: Tensor,
    weight: Tensor,
    padding: int | tuple[int, int] | str,
    dilation: int | tuple[int, int],
) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """Padding as (top, bottom, left, right) and dilation as (vertical, horizontal)."""
    kernel_size = (weight.shape[-2], weight.shape[-1])
    if min(kernel_size) < 1:
        raise ValueError(f"{operator}: weight has an empty kernel, {list(weight.shape)}")
    steps = _contract.int_pair(operator, "dilation", dilation, minimum=1)
    if isinstance(padding, str):
        if padding != "same":
            raise ValueError(f'{operator}: padding must be "same" or ints, got {padding!r}')
    else:
        padding = _contract.int_pair(operator, "padding", padding, minimum=0)
    sides = resolve_padding(padding, kernel_size, steps)
    height, width = input.shape[2:]
    if min(output_size(input, weight, sides, steps)) < min(1, height, width):
        raise ValueError(
            f"{operator}: weight {list(weight.shape)} with dilation {steps} does not fit into input"
            f" {list(input.shape)} with padding {padding}"
        )
    return sides, steps


def output_size(
    input: Tensor, weight: Tensor, padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    top, bottom, left, right = padding
    height = input.shape[2] + top + bottom - dilation[0] * (weight.shape[-2] - 1)
    width = input.shape[3] + left + right - dilation[1] * (weight.shape[-1] - 1)
    return height, width


def readable(input: Tensor) -> Tensor:
    """The kernels read any view in which columns or channels are dense; of others, a copy."""
    return input if 1 in (input.stride(3), input.stride(1)) else input.contiguous()


def layout(input: Tensor) -> torch.memory_format:
    """The layout of every result, by the rule that each backend goes by: dense columns first."""
    dense_columns = input.stride(3) == 1 or input.stride(1) != 1
    return torch.contiguous_format if dense_columns else torch.channels_last


def empty(size: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout(like))


def define(operator: str, *, native: Sequence[str]) -> _operator.Operator:
    """The operator vfmk::`operator`, its backward, their fakes, autograd and backends.

    Args:
        native: devices that the compiled library has kernels for.
    """

    @_operator.define(operator)
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Tensor:
        output = empty_output(input, weight, bias, padding, dilation)
        arguments = (
            readable(input),
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            padding,
            dilation,
            output,
        )
        _backends.kernel(operator, "forward", input, weight, padding)(*arguments)
        return output

    @forward.register_fake
    def empty_output(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Tensor:
        size = output_size(input, weight, padding, dilation)
        return empty((input.shape[0], weight.shape[1], *size), input)

    @_operator.define(f"{operator}_backward")
    def backward(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: Sequence[int],
        dilation: Sequence[int],
        wanted: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = empty_gradients(grad_output, input, weight, bias, padding, dilation, wanted)
        arguments = (
            grad_output.contiguous(memory_format=layout(input)),
            readable(input),
            weight.contiguous(),
            padding,
            dilation,
            *_contract.if_wanted(gradients, wanted),
        )
        _backends.kernel(operator, "backward", input, weight, padding)(*arguments)
        return gradients

    @backward.register_fake
    def empty_gradients(
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
            empty(input.shape, input) if wanted[0] else input.new_empty(0),
            weight.new_empty(weight.shape if wanted[1] else 0),
            input.new_empty(0) if bias is None or not wanted[2] else bias.new_empty(bias.shape),
        )

    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        input, weight, bias, ctx.padding, ctx.dilation = inputs
        ctx.save_for_backward(input, weight, bias)

    def gradients(ctx, grad_output: Tensor):  # type: ignore[no-untyped-def]
        wanted = list(ctx.needs_input_grad[:3])
        found = backward(grad_output, *ctx.saved_tensors, ctx.padding, ctx.dilation, wanted)
        return *_contract.if_wanted(found, wanted), None, None

    forward.register_autograd(gradients, setup_context=setup_context)
    _implementations.register(operator, native=native)
    return forward
