"""Semantic segmentation: a class for each pixel."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmk.data.dataset import IGNORE
from vfmk.tasks.losses import semantic_losses
from vfmk.tasks.pyramid import SimpleFeaturePyramid, normalisation
from vfmk.tasks.task import Evaluation, Target, Task, at_original_size

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

    from vfmk.sam.adapt import AdaptedSam


class SemanticHead(nn.Module):
    """Every map of a simple feature pyramid, brought to the finest one's size and summed (Kirillov
    et al., 2019, "Panoptic Feature Pyramid Networks"), then a class for each cell."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.pyramid = SimpleFeaturePyramid(channels)
        self.lateral = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                normalisation(channels),
                nn.ReLU(),
            )
            for _ in self.pyramid.levels
        )
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, embedding: Tensor) -> Tensor:
        """[B, C, H, W] → logits [B, num_classes, 4H, 4W]."""
        maps = self.pyramid(embedding)
        finest = maps[0].shape[-2:]
        fused = [
            F.interpolate(lateral(level), finest, mode="bilinear", align_corners=False)
            for lateral, level in zip(self.lateral, maps, strict=True)
        ]
        return self.classify(torch.stack(fused).sum(0))


class SemanticTask(Task):
    """`SemanticHead` on the encoder's neck, trained by `semantic_losses`."""

    name = "semantic"
    score = "miou"

    def __init__(self, model: "Sam | AdaptedSam", classes: Sequence[str]) -> None:
        super().__init__(model, classes)
        channels = self.sam.prompt_encoder.embed_dim
        self.head = SemanticHead(channels, len(self.classes))

    def forward(self, images: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        logits = self.head(self.encode(images, targets))
        logits = F.interpolate(
            logits.float(), images.shape[-2:], mode="bilinear", align_corners=False
        )
        truth = torch.stack([torch.as_tensor(target["semantic"]) for target in targets])
        return semantic_losses(logits, truth.long(), IGNORE)

    def predict(self, images: Tensor, targets: Sequence[Target]) -> list[Target]:
        """{"semantic": int64 [H0, W0]} for each image."""
        logits = self.head(self.encode(images, targets))
        return [
            {"semantic": at_original_size(z, images.shape[-1], target).argmax(0).cpu()}
            for z, target in zip(logits, targets, strict=True)
        ]

    def evaluation(self) -> "SemanticEvaluation":
        return SemanticEvaluation(len(self.classes))


class SemanticEvaluation(Evaluation):
    """ "miou" and "dice": over all labelled pixels of the data set, the mean over classes; those
    neither there nor predicted are left out."""

    def __init__(self, num_classes: int) -> None:
        from torchmetrics.classification import MulticlassF1Score, MulticlassJaccardIndex

        options: dict[str, Any] = {
            "ignore_index": IGNORE,
            "average": "macro",
            "sync_on_compute": False,
        }
        super().__init__(
            {
                "miou": MulticlassJaccardIndex(num_classes, **options),
                "dice": MulticlassF1Score(num_classes, **options),
            }
        )

    def update(self, prediction: Mapping[str, Any], truth: Mapping[str, Any]) -> None:
        expected = torch.as_tensor(truth["semantic"]).long()
        for metric in self.metrics.values():
            metric.update(prediction["semantic"][None], expected[None])
