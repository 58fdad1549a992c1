"""Data sets to fine-tune on, their transforms, and generated samples."""

from vfmk.data.dataset import DataError, RecordDataset, digest
from vfmk.data.open_dataset import open_dataset
from vfmk.data.transforms import collate, transforms, unletterbox, unletterbox_boxes

__all__ = [
    "DataError",
    "RecordDataset",
    "collate",
    "digest",
    "open_dataset",
    "transforms",
    "unletterbox",
    "unletterbox_boxes",
]
