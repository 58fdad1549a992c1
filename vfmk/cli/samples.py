"""The samples that a command's options name."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vfmk.data.sample import Sample


def searched_and_test(
    data: Path, split: str | None, limit: int, test_data: Path | None, test_split: str | None
) -> tuple[list["Sample"], list["Sample"]]:
    """The first `limit` samples of `data`; and those to test on, by default the rest."""
    if test_data is None and test_split is None:
        samples = _load(data, split, None)
        return samples[:limit], samples[limit:]
    return _load(data, split, limit), _load(test_data or data, test_split, None)


def _load(path: Path, split: str | None, limit: int | None) -> list["Sample"]:
    """Never of several splits at once.

    Raises:
        DataError: a manifest has several, and none is named.
    """
    from vfmk.channels import load_samples
    from vfmk.data.folder import pairs_of_manifest

    if path.is_file():
        pairs_of_manifest(path, split, None)
    return load_samples(path, limit, split=split)
