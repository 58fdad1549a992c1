"""A small data set in memory: red discs and green squares on noise, for every task."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

CLASSES = ("background", "disc", "square")
COLOURS = np.array([[200, 60, 50], [40, 190, 80]], np.float32)


class Shapes(Dataset[Any]):
    """As `vfmk.data.open_dataset` gives them; `sizes` are (H, W) of the images in turn."""

    def __init__(
        self, task: str, count: int, *, seed: int = 0, sizes=((128, 128), (100, 128))
    ) -> None:
        self.task, self.count, self.seed, self.sizes = task, count, seed, sizes
        self.classes = ["object"] if task == "promptable" else list(CLASSES)
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        rng = np.random.default_rng((self.seed, index))
        height, width = self.sizes[index % len(self.sizes)]
        image = rng.normal(110, 20, (height, width, 3)).astype(np.float32)
        y, x = np.mgrid[:height, :width]
        masks, labels = [], []
        for label in (1, 2):
            radius = rng.integers(12, 20)
            left = 0 if label == 1 else width // 2  # so that they do not overlap
            centre_x = rng.integers(left + radius, left + width // 2 - radius)
            centre_y = rng.integers(radius, height - radius)
            across, down = abs(x - centre_x), abs(y - centre_y)
            distance = np.hypot(across, down) if label == 1 else np.maximum(across, down)
            mask = distance < radius
            image[mask] = COLOURS[label - 1] + rng.normal(0, 10, (mask.sum(), 3))
            masks.append(mask)
            labels.append(label)
        pixels = torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)
        target = self._target(np.stack(masks), labels, index)
        return tv_tensors.Image(pixels), {"files": (f"shapes-{index}.png",), **target}

    def _target(self, masks: np.ndarray, labels: list[int], index: int) -> dict[str, Any]:
        if self.task == "promptable":
            return {"masks": tv_tensors.Mask(torch.from_numpy(masks))}
        if self.task == "semantic":
            semantic = (masks * np.array(labels)[:, None, None]).sum(0).astype(np.uint8)
            return {"semantic": tv_tensors.Mask(torch.from_numpy(semantic))}
        boxes = []
        for mask in masks:
            rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
            boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                torch.tensor(boxes, dtype=torch.float32), format="XYXY", canvas_size=masks.shape[1:]
            ),
            "labels": torch.tensor(labels),
            "iscrowd": torch.zeros(len(labels), dtype=torch.bool),
            "image_id": index,
        }
        if self.task == "instance":
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        return target
