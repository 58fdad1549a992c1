"""Dense convolution whose kernels differ from sample to sample."""

from torch import Tensor

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
    return _forward(input, weight, bias, sides, steps)


_forward = _convolution.define(NAME, native=("cpu",))
