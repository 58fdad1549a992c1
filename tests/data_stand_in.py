"""The part of vfmk.data that training needs, where this tree does not have it yet."""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

import vfmk.data


def install() -> None:
    for function in (collate, digest, transforms, unletterbox, unletterbox_boxes):
        if not hasattr(vfmk.data, function.__name__):
            setattr(vfmk.data, function.__name__, function)


def collate(batch):
    return torch.stack([image.as_subclass(Tensor) for image, _ in batch]), [t for _, t in batch]


def digest(dataset):
    return hashlib.sha256(repr((dataset.classes, len(dataset))).encode()).hexdigest()


def transforms(task, size, train):
    """Letterbox; in training, half of the images mirrored."""

    def apply(image, target):
        pixels = image.as_subclass(Tensor)
        height, width = pixels.shape[-2:]
        scale = size / max(height, width)
        small = (int(height * scale + 0.5), int(width * scale + 0.5))
        flip = train and bool(torch.rand(()) < 0.5)
        target = target | {"input_size": small, "original_size": (height, width)}

        def square(planes, fill):
            planes = planes.as_subclass(Tensor)
            planes = planes.flip(-1) if flip else planes
            resized = F.interpolate(planes[None].float(), small, mode="nearest-exact")[0]
            out = torch.full((len(planes), size, size), fill, dtype=planes.dtype)
            out[:, : small[0], : small[1]] = resized.to(planes.dtype)
            return out

        if "masks" in target:
            target["masks"] = square(target["masks"], 0)
        if "semantic" in target:
            target["semantic"] = square(target["semantic"][None], 255)[0]
        if "boxes" in target:
            boxes = target["boxes"].as_subclass(Tensor)
            if flip:
                boxes = torch.stack(
                    [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1
                )
            target["boxes"] = boxes * torch.tensor([small[1] / width, small[0] / height] * 2)
        return square(pixels, 110), target

    return apply


def unletterbox(masks, input_size, original_size):
    inside = masks[..., : input_size[0], : input_size[1]]
    return F.interpolate(inside, tuple(original_size), mode="bilinear", align_corners=False)


def unletterbox_boxes(boxes, input_size, original_size):
    ratio = [original_size[1] / input_size[1], original_size[0] / input_size[0]]
    return boxes * boxes.new_tensor(ratio * 2)
