"""Depthwise convolution whose kernels differ from sample to sample."""

from torch import Tensor

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
    return _forward(input, weight, bias, sides, steps)


def _check_channels(input: Tensor, **others: Tensor | None) -> None:
    channels = input.shape[1]
    for argument, other in others.items():
        if other is not None and other.shape[1] != channels:
            raise ValueError(
                f"{NAME}: {argument} has {other.shape[1]} channels, input has {channels}"
            )


_forward = _convolution.define(NAME, native=("cuda", "cpu"))
