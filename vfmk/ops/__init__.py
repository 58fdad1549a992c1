"""The operators: contract, checks, autograd, autocast. What runs them is `vfmk.backends()`'s."""

from vfmk.ops.dynamic_depthwise_conv2d import dynamic_depthwise_conv2d

__all__ = ["dynamic_depthwise_conv2d"]
