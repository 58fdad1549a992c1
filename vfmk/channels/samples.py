"""The samples of a search."""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vfmk.data.sample import Sample


def load_samples(
    path: str | PathLike[str], limit: int | None = None, *, split: str | None = None
) -> list["Sample"]:
    """`vfmk.data.folder.load_samples`: images, masks and points of a folder or a manifest.

    Each sample has `image` (uint8 [H, W, 3]), `mask` (bool [H, W]), `points` (float32 [P, 2], x and
    y in pixels) and `labels` (int64 [P]).
    """
    from vfmk.data import folder

    return folder.load_samples(path, limit, split=split)
