"""The operators: contract, checks, autograd, autocast. What runs them is `vfmk.backends()`'s."""

from vfmk.ops.adapter_attention import adapter_attention
from vfmk.ops.attention_pool import attention_pool
from vfmk.ops.channel_remap import channel_remap
from vfmk.ops.dynamic_conv2d import dynamic_conv2d
from vfmk.ops.dynamic_depthwise_conv2d import dynamic_depthwise_conv2d
from vfmk.ops.layer_norm_2d import layer_norm_2d
from vfmk.ops.mask_iou import mask_iou
from vfmk.ops.rel_pos_attention import rel_pos_attention
from vfmk.ops.window_rel_pos_attention import window_rel_pos_attention

__all__ = [
    "adapter_attention",
    "attention_pool",
    "channel_remap",
    "dynamic_conv2d",
    "dynamic_depthwise_conv2d",
    "layer_norm_2d",
    "mask_iou",
    "rel_pos_attention",
    "window_rel_pos_attention",
]
