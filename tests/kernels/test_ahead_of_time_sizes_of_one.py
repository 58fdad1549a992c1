"""Every Triton kernel where all sizes and strides are 1, compiled ahead of time.

A launch makes an integer that is 1 a constant unless told otherwise, and a constant has no `.to`:
such a kernel does not compile on a GPU, while the interpreter runs it.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.aot import Launch, compiled, recorded
from vfmk.kernels import (
    _rel_pos_plan,
    adapter_attention,
    attention_pool,
    channel_remap,
    dynamic_conv2d,
    dynamic_depthwise_conv2d,
    layer_norm_2d,
    mask_iou,
    rel_pos_attention,
)

CAPABILITY = 80


def one(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def activation(channels_last: bool, rows: bool) -> Tensor:
    """One pixel; with `rows`, of a view whose rows leave gaps."""
    row, column = (1, 1) if not rows else (1, 2) if channels_last else (2, 1)
    return one(1, 1, 1, 1).as_strided((1, 1, 1, 1), (1, 1, row, column))


def remap(channels_last: bool, rows: bool) -> None:
    image, scale = activation(channels_last, rows), one(1, 1)
    index = one(1, 1, dtype=torch.int64)
    channel_remap.forward(image, index, scale, channels_last, image)
    channel_remap.backward(image, image, index, scale, 1, channels_last, image, scale)


def norm(channels_last: bool, rows: bool) -> None:
    image, weight = activation(channels_last, rows), one(1)
    index = one(1, dtype=torch.int64)
    mean = one(1, 1, 1, dtype=torch.float32)
    layer_norm_2d.forward(image, weight, weight, index, 1.0, channels_last, image, mean, mean)
    layer_norm_2d.backward(
        *(image, image, weight, index, mean, mean, channels_last, image, weight, weight)
    )


def iou(low_size: tuple[int, int], image_size: int, original_size: tuple[int, int]) -> None:
    target = one(*original_size, dtype=torch.bool)
    mask_iou.forward(one(1, *low_size), target, (1, 1), image_size, 0.0, one(1))


def depthwise(side: int, channels_last: bool) -> None:
    image, weight, bias = one(1, 1, 1, 1), one(1, 1, side, side), one(1, 1)
    if channels_last:
        image = one(1, 1, 9, 1).permute(0, 3, 1, 2)
    geometry = (side // 2,) * 4, (1, 1)
    dynamic_depthwise_conv2d.forward(image, weight, bias, *geometry, image)
    dynamic_depthwise_conv2d.backward(image, image, weight, *geometry, image, weight, bias)


def dense() -> None:
    image, weight, bias = one(1, 1, 1, 1), one(1, 1, 1, 3, 3), one(1, 1)
    geometry = (1, 1, 1, 1), (1, 1)
    dynamic_conv2d.forward(image, weight, bias, *geometry, image)
    dynamic_conv2d.backward(image, image, weight, *geometry, image, weight, bias)


def adapter() -> None:
    input, parameters = one(1, 1, 1), (one(3, 1), one(3))
    log_sum_exp = one(1, 1, 1, dtype=torch.float32)
    adapter_attention.forward(input, *parameters, 1, 1.0, input, log_sum_exp)
    adapter_attention.backward(
        *(input, input, *parameters, input, log_sum_exp, 1, 1.0, input, *parameters)
    )


def pool() -> None:
    tokens, queries, output = one(1, 1, 1), one(1, 1), one(1, 1, 1)
    log_sum_exp = one(1, 1, dtype=torch.float32)
    attention_pool.forward(tokens, queries, 1.0, output, log_sum_exp)
    attention_pool.backward(output, tokens, queries, output, log_sum_exp, 1.0, tokens, queries)


def attention(grid_size: tuple[int, int]) -> None:
    """In windows of one token; several of them are padded."""
    qkv = one(1, *grid_size, 3, 1, 1).unbind(3)
    pads = (None, None) if grid_size == (1, 1) else (one(1, 1),) * 2
    arguments = (*qkv, one(1, *grid_size, 1, 2), *pads)
    output, log_sum_exp = one(1, *grid_size, 1, 1), one(1, 1, *grid_size, dtype=torch.float32)
    geometry = ((1, 1), 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rel_pos_plan, "capability", lambda device: divmod(CAPABILITY, 10))
        rel_pos_attention.forward(*arguments, *geometry, output, log_sum_exp)
        rel_pos_attention.backward(output, *arguments, output, log_sum_exp, *geometry, *arguments)


CALLS: dict[str, Callable[[], None]] = {
    "channel_remap, nchw": lambda: remap(False, False),
    "channel_remap, nchw, rows": lambda: remap(False, True),
    "channel_remap, channels-last": lambda: remap(True, False),
    "channel_remap, channels-last, rows": lambda: remap(True, True),
    "layer_norm_2d, nchw": lambda: norm(False, False),
    "layer_norm_2d, channels-last, rows": lambda: norm(True, True),
    "mask_iou": lambda: iou((1, 1), 1, (1, 1)),
    "mask_iou, to larger": lambda: iou((9, 8), 1, (60, 80)),
    "dynamic_depthwise_conv2d, nchw": lambda: depthwise(3, False),
    "dynamic_depthwise_conv2d, channels-last": lambda: depthwise(3, True),
    "dynamic_depthwise_conv2d, plain path": lambda: depthwise(9, False),
    "dynamic_conv2d": dense,
    "adapter_attention": adapter,
    "attention_pool": pool,
    "rel_pos_attention": lambda: attention((1, 1)),
    "rel_pos_attention, windows": lambda: attention((3, 1)),
}


def constant(launch: Launch) -> list[str]:
    """The arguments that this launch makes constants because they are 1."""
    return [
        parameter.name
        for parameter in launch.kernel.params
        if not (parameter.is_constexpr or parameter.do_not_specialize)
        and isinstance(launch.arguments[parameter.name], int)
        and launch.arguments[parameter.name] == 1
    ]


@pytest.mark.parametrize("call", CALLS)
def test_compiles(call):
    with recorded() as launches:
        CALLS[call]()
    assert launches
    for launch in launches:
        assert compiled(launch, CAPABILITY).cubin
    if call.startswith(("channel_remap", "layer_norm_2d", "mask_iou")):
        assert any(map(constant, launches))
