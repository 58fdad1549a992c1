"""The `padding` argument of the convolution operators."""


def resolve_padding(
    padding: int | tuple[int, int] | str, kernel_size: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Zeros added at (top, bottom, left, right).

    "same" keeps the size; an even kernel then gets its odd zero at the bottom and right, as in
    `torch.nn.functional.conv2d`.
    """
    if isinstance(padding, str):  # "same"
        total_h, total_w = (d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True))
        return total_h // 2, total_h - total_h // 2, total_w // 2, total_w - total_w // 2
    pad_h, pad_w = pair(padding)
    return pad_h, pad_h, pad_w, pad_w


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(vertical, horizontal) of an argument that takes one int for both."""
    return (value, value) if isinstance(value, int) else value
