"""Self-attention in an adapter's bottleneck, with the projections inside."""

from collections.abc import Sequence

from torch import Tensor

from vfmk import _backends
from vfmk.ops import _contract, _implementations, _operator
from vfmk.reference.sums import dtype_of_sums

NAME = "adapter_attention"


def adapter_attention(
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    num_heads: int = 1,
    *,
    scale: float | None = None,
) -> Tensor:
    """Project N tokens to queries, keys and values, and attend: three projections in, none out.

    Differentiable, once, in all three tensors, in O(N·r) memory: scores are never stored. Sums are
    fp32 (fp64 for float64), those of the projections too, and the bits are the same on each run.
    Works under autocast, torch.compile and torch.export. float64 and, on CUDA, an r above 64 run in
    plain PyTorch, whose scores take O(num_heads·N²) memory.

    Args:
        input: [B, N, r], float32, float16, bfloat16 or float64. Read in place whatever the
            strides, if r is dense; else copied first. B or N may be 0.
        qkv_weight: [3r, r] of input's dtype: rows for the queries, then the keys, then the values;
            in each, the heads one after the other.
        qkv_bias: [3r] of input's dtype.
        num_heads: a divisor of r. An r of 8 to 64 with 1 to 4 heads is the fast range.
        scale: factor of the dot products; by default 1/√(r / num_heads).

    Returns:
        [B, N, r] in input's dtype, contiguous.

    Raises:
        TypeError, ValueError: naming the argument.

    Equivalent to::

        qkv = torch.nn.functional.linear(input, qkv_weight, qkv_bias)
        qkv = qkv.view(B, N, 3, num_heads, r // num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        output = (scale * q @ k.transpose(2, 3)).softmax(-1) @ v
        output = output.transpose(1, 2).reshape(B, N, r)

    Source: VFM-Adapter (AAAI 2025), the global branch of hybrid operation mapping.
    """
    _check(input, qkv_weight, qkv_bias, num_heads)
    default = (input.shape[2] // num_heads) ** -0.5
    scale = default if scale is None else _contract.as_float(NAME, "scale", scale)
    input, qkv_weight, qkv_bias = _contract.autocast(  # type: ignore[assignment]
        input, qkv_weight, qkv_bias
    )
    return _forward(input, qkv_weight, qkv_bias, num_heads, scale)[0]


def _check(input: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, num_heads: int) -> None:
    _contract.check_tensor(NAME, "input", input, "B, N, r")
    _contract.check_tensor(NAME, "qkv_weight", qkv_weight, "3r, r")
    _contract.check_tensor(NAME, "qkv_bias", qkv_bias, "3r")
    _contract.check_alike(NAME, input, qkv_weight=qkv_weight, qkv_bias=qkv_bias)
    rank = input.shape[2]
    if rank < 1:
        raise ValueError(f"{NAME}: input has an r of 0, {list(input.shape)}")
    for argument, tensor, shape in (
        ("qkv_weight", qkv_weight, (3 * rank, rank)),
        ("qkv_bias", qkv_bias, (3 * rank,)),
    ):
        if tensor.shape != shape:
            raise ValueError(
                f"{NAME}: {argument} must be {list(shape)} for input {list(input.shape)},"
                f" got {list(tensor.shape)}"
            )
    _contract.check_int(NAME, "num_heads", num_heads)
    if num_heads < 1 or rank % num_heads != 0:
        raise ValueError(f"{NAME}: num_heads must be a divisor of r = {rank}, got {num_heads}")


@_operator.define(NAME)
@_backends.without_autocast
def _forward(
    input: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    output, log_sum_exp = _empty_output(input, qkv_weight, qkv_bias, num_heads, scale)
    kernel = _backends.kernel(NAME, "forward", input, num_heads)
    if input.numel() > 0:
        kernel(
            _contract.dense_last(input), qkv_weight.contiguous(), qkv_bias.contiguous(),
            num_heads, scale, output, log_sum_exp,
        )  # fmt: skip
    return output, log_sum_exp


@_forward.register_fake
def _empty_output(
    input: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and for backward the logarithm of each query's sum: [B, heads, N]."""
    batch, tokens, _ = input.shape
    log_sum_exp = input.new_empty((batch, num_heads, tokens), dtype=dtype_of_sums(input))
    return input.new_empty(input.shape), log_sum_exp


@_operator.define(f"{NAME}_backward")
@_backends.without_autocast
def _backward(
    grad_output: Tensor,
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    num_heads: int,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(
        grad_output, input, qkv_weight, qkv_bias, output, log_sum_exp, num_heads, scale, wanted
    )
    kernel = _backends.kernel(NAME, "backward", input, num_heads)
    if input.numel() > 0:
        kernel(
            grad_output.contiguous(), _contract.dense_last(input),
            qkv_weight.contiguous(), qkv_bias.contiguous(), output, log_sum_exp, num_heads, scale,
            *_contract.if_wanted(gradients, wanted),
        )  # fmt: skip
    else:
        for gradient in gradients:
            gradient.zero_()
    return gradients


@_backward.register_fake
def _empty_gradients(
    grad_output: Tensor,
    input: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    num_heads: int,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    grad_input, grad_weight, grad_bias = _contract.empty_gradients(
        (input, qkv_weight, qkv_bias), wanted
    )
    return grad_input, grad_weight, grad_bias


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.num_heads, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad_output: Tensor, _: Tensor | None):  # type: ignore[no-untyped-def]
    wanted = list(ctx.needs_input_grad[:3])
    gradients = _backward(grad_output, *ctx.saved_tensors, ctx.num_heads, ctx.scale, wanted)
    return *_contract.if_wanted(gradients, wanted), None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


_implementations.register(NAME)
