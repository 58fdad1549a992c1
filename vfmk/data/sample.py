"""What promptable segmentation is measured on: an image, one object's mask, the points given."""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage


@dataclass(frozen=True, eq=False)
class Sample:
    id: str
    image: np.ndarray  # uint8 [H, W, 3], RGB
    mask: np.ndarray  # bool [H, W]
    points: np.ndarray  # float32 [P, 2], (x, y) in pixels of `image`
    labels: np.ndarray  # int64 [P], 1 on the object, 0 off it

    def shrunk(self, long_side: int) -> "Sample":
        """The sample with its longer side at `long_side` pixels, if it is larger."""
        height, width = self.mask.shape
        ratio = long_side / max(height, width)
        if ratio >= 1:
            return self
        size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
        image = Image.fromarray(self.image).resize(size, Image.Resampling.BOX)
        mask = Image.fromarray(self.mask).resize(size, Image.Resampling.NEAREST)
        points = self.points * (np.array(size) / (width, height)).astype(np.float32)
        return Sample(self.id, np.array(image), np.array(mask), points, self.labels)

    @classmethod
    def with_deepest_point(cls, id: str, image: np.ndarray, mask: np.ndarray) -> "Sample":
        """A sample whose prompt is the one point farthest from the edge of its mask."""
        return cls(id, image, mask, deepest_point(mask)[None], np.ones(1, np.int64))


def deepest_point(mask: np.ndarray) -> np.ndarray:
    """The point of a bool mask [H, W] farthest from all that is not mask, the image's border
    included: float32 (x, y)."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), mask.shape)
    return np.array([x, y], np.float32)
