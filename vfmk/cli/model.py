"""The model that a command's options name."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segment_anything.modeling import Sam


def load_model(name: str, checkpoint: Path | None, adapter: Path | None) -> "Sam":
    """A SAM, accelerated, on the GPU where there is one, with the adapter's effect if given.

    Raises:
        ValueError: no checkpoint of a model whose weights are not bundled: they would be random.
    """
    import torch

    import vfmk
    from vfmk.sam.load import MODELS

    if checkpoint is None and name in MODELS and name != "tiny":
        raise ValueError(f"{name!r} comes without weights: give a checkpoint by --checkpoint")
    sam = vfmk.accelerate(vfmk.load_sam(name, checkpoint))
    sam.to("cuda" if torch.cuda.is_available() else "cpu")
    return sam if adapter is None else vfmk.AdaptedSam.from_pretrained(sam, adapter).sam
