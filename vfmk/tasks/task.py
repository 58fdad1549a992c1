"""What the training loop knows of a task."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from vfmk.data.dataset import Target, TaskName
from vfmk.sam.adapt import AdaptedSam

if TYPE_CHECKING:
    from segment_anything.modeling import Sam
    from torchmetrics import Metric


class Evaluation:
    """Scores over a data set, by torchmetrics.

    Each process updates one of its own with its share of the images, and they are merged; the
    metrics are made with sync_on_compute=False, since their own synchronisation needs as many
    images in every process.
    """

    def __init__(self, metrics: "Mapping[str, Metric]") -> None:
        self.metrics = metrics

    def update(self, prediction: Mapping[str, Any], truth: Mapping[str, Any]) -> None:
        """One image at its own size."""
        raise NotImplementedError

    def merge(self, other: "Evaluation") -> None:
        """The images of another of the same kind, after this one's own."""
        for name, metric in self.metrics.items():
            added: dict[str, Any] = other.metrics[name].metric_state
            for key, state in metric.metric_state.items():
                # Sums, and lists of an item for each image.
                setattr(metric, key, state + added[key])

    def compute(self) -> dict[str, float]:
        return {name: metric.compute().item() for name, metric in self.metrics.items()}


class Task(nn.Module):
    """A Sam, adapted or not, and the head of one task.

    Images are uint8 [B, 3, S, S] as `vfmk.data.transforms` gives them: the picture at the top left,
    of target["input_size"], the rest padding.

    Args:
        model: the Sam.
        classes: names of the data's classes.
    """

    name: ClassVar[TaskName]
    score: ClassVar[str]  # the key of `Evaluation.compute` by which the best checkpoint is chosen

    def __init__(self, model: "Sam | AdaptedSam", classes: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.classes = tuple(classes)

    @property
    def sam(self) -> "Sam":
        return self.model.sam if isinstance(self.model, AdaptedSam) else self.model

    @property
    def unused(self) -> tuple[nn.Module, ...]:
        """Parts of the Sam that this task's loss never reaches."""
        return (self.sam.prompt_encoder, self.sam.mask_decoder)

    @property
    def prepare(self) -> Callable[[Target, np.random.Generator], Target]:
        """Applied to each target after the transforms in training; picklable, for workers."""
        return _unchanged

    @property
    def prepare_evaluation(self) -> Callable[[Target], Target]:
        """The same for evaluation; target["truth"] is the target at the image's own size."""
        return _same

    def forward(self, images: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """The parts of the loss, scalars, by name; their sum is what is minimised."""
        raise NotImplementedError

    def predict(self, images: Tensor, targets: Sequence[Target]) -> list[Target]:
        """For each image what its truth is given as, at target["original_size"], on the CPU."""
        raise NotImplementedError

    def evaluation(self) -> Evaluation:
        raise NotImplementedError

    def encode(self, images: Tensor, targets: Sequence[Target]) -> Tensor:
        """The embedding [B, C, H, W], the padding being zero as in `Sam.preprocess`."""
        pixels = (images - self.sam.pixel_mean) / self.sam.pixel_std
        for image, target in zip(pixels, targets, strict=True):
            height, width = target["input_size"]
            image[:, height:] = 0
            image[:, :, width:] = 0
        return self.sam.image_encoder(pixels)


def at_original_size(logits: Tensor, image_size: int, target: Target) -> Tensor:
    """Logits [K, h, w] of one padded image → [K, H0, W0], as SAM enlarges its masks."""
    from vfmk.data import unletterbox

    enlarged = torch.nn.functional.interpolate(
        logits[None].float(), (image_size, image_size), mode="bilinear", align_corners=False
    )
    return unletterbox(enlarged, target["input_size"], target["original_size"])[0]


def _unchanged(target: Target, rng: np.random.Generator) -> Target:
    return target


def _same(target: Target) -> Target:
    return target
