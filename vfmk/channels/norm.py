"""SAM's channel norm that writes other channels."""

import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor

from vfmk import ops


class MappedLayerNorm2d(LayerNorm2d):
    """LayerNorm2d followed by a gather of channels, in the norm's own passes.

    Same operations in the same order as LayerNorm2d, so a channel keeps its bits wherever it goes.
    """

    channel_index: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        index = self.channel_index
        centred = x - x.mean(1, keepdim=True)
        variance = centred.pow(2).mean(1, keepdim=True)
        normal = centred / torch.sqrt(variance + self.eps)
        dtype = torch.promote_types(normal.dtype, self.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):  # which would round the normal
            scaled = ops.channel_remap(normal.to(dtype), index, self.weight[index].to(dtype))
        return scaled + self.bias[index, None, None]
