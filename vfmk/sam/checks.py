"""Whether a Sam can be adapted, and as a configuration asks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vfmk.nn.config import VFMAdapterConfig
from vfmk.sam import base

if TYPE_CHECKING:
    from segment_anything.modeling import Sam


def check_sam(sam: "Sam") -> None:
    from segment_anything.modeling import ImageEncoderViT, Sam

    from vfmk.sam.block import is_adapted, is_known

    if not isinstance(sam, Sam):
        raise TypeError(
            f"get_adapted_model: sam must be a segment_anything Sam, got {type(sam).__name__}"
        )
    encoder = base.image_encoder_of(sam)
    if not isinstance(encoder, ImageEncoderViT):
        raise TypeError(
            "get_adapted_model: sam.image_encoder must be an ImageEncoderViT,"
            f" got {type(encoder).__name__}"
        )
    strangers = [i for i, block in enumerate(encoder.blocks) if not is_known(block)]
    if strangers:
        raise ValueError(f"get_adapted_model: blocks {strangers} are not segment_anything's own")
    if is_adapted(encoder):
        raise ValueError("get_adapted_model: sam is adapted already; unload() it first")


def check_config(method: str, sam: "Sam", config: VFMAdapterConfig) -> list[str]:
    """Paths of the `modules_to_save`."""
    if not isinstance(config, VFMAdapterConfig):
        raise TypeError(f"{method}: config must be a VFMAdapterConfig, got {type(config).__name__}")
    depth = len(base.image_encoder_of(sam).blocks)
    if beyond := [i for i in config.layers_to_transform or () if i >= depth]:
        raise ValueError(
            f"{method}: layers_to_transform has {beyond}, the encoder has {depth} blocks"
        )
    return paths_of(method, sam, config.modules_to_save)


def paths_of(method: str, sam: "Sam", modules_to_save: Sequence[str]) -> list[str]:
    """Of modules to train beside adapters, each given by its path or, as in peft, the end of it."""
    known = base.module_paths(sam)
    paths = []
    for name in modules_to_save:
        found = [p for p in known if p == name] or [p for p in known if p.endswith(f".{name}")]
        if len(found) != 1:
            several = f"; it is the name of {', '.join(found)}" if found else ", sam does not"
            raise ValueError(f"{method}: modules_to_save has {name!r}{several}")
        paths += found
    for path in paths:
        if inside := [other for other in paths if other.startswith(f"{path}.")]:
            raise ValueError(f"{method}: modules_to_save has {inside[0]!r} inside {path!r}")
        if paths.count(path) > 1:
            raise ValueError(f"{method}: modules_to_save has {path!r} twice")
        if f"{path}.".startswith("image_encoder.blocks.") or path == "image_encoder":
            raise ValueError(f"{method}: modules_to_save has {path!r}, which holds the adapters")
    return paths
