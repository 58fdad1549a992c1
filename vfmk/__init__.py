"""Fused, differentiable operators for adapting and serving the Segment Anything Model."""

from importlib.metadata import version

from vfmk import channels, ops, reference
from vfmk._backends import BackendError, backends, use_backend
from vfmk.nn.config import VFMAdapterConfig
from vfmk.sam.accelerate import accelerate, restore
from vfmk.sam.adapt import AdaptedSam, get_adapted_model
from vfmk.sam.load import load_sam

__version__ = version("vfmk")
__all__ = [
    "AdaptedSam",
    "BackendError",
    "VFMAdapterConfig",
    "accelerate",
    "backends",
    "channels",
    "get_adapted_model",
    "load_sam",
    "ops",
    "reference",
    "restore",
    "use_backend",
]
