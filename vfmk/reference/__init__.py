"""The mathematics of every operator in a few lines of plain PyTorch: the definition of truth."""

from vfmk.reference.adapter_attention import adapter_attention
from vfmk.reference.attention_pool import attention_pool
from vfmk.reference.channel_remap import channel_remap
from vfmk.reference.dynamic_conv2d import dynamic_conv2d
from vfmk.reference.dynamic_depthwise_conv2d import dynamic_depthwise_conv2d
from vfmk.reference.layer_norm_2d import layer_norm_2d
from vfmk.reference.mask_iou import mask_iou
from vfmk.reference.rel_pos_attention import rel_pos_attention, window_rel_pos_attention

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
