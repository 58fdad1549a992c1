"""Promptable segmentation: SAM's own decoder, a mask for each point or box."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmk.data.sample import deepest_point
from vfmk.tasks.losses import prompted_losses
from vfmk.tasks.prompts import decode, draw_box, draw_point
from vfmk.tasks.task import Evaluation, Target, Task, at_original_size

PROMPTS = 4  # for each image
BOX_SHARE = 0.3


class PromptableTask(Task):
    """Trained on PROMPTS points or boxes drawn from each image's masks, with `prompted_losses`;
    scored by the mean over masks of the single mask's IoU and Dice from one point each: the given
    one, or the mask's deepest.
    """

    name = "promptable"
    score = "iou"

    @property
    def unused(self) -> tuple[nn.Module, ...]:
        return (self.sam.prompt_encoder.mask_downscaling,)

    @property
    def prepare(self) -> Callable[[Target, np.random.Generator], Target]:
        mask_size = 4 * self.sam.prompt_encoder.image_embedding_size[0]
        return partial(_draw_prompts, mask_size=mask_size)

    @property
    def prepare_evaluation(self) -> Callable[[Target], Target]:
        return _give_points

    def forward(self, images: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        embedding = self.encode(images, targets)
        point, box, is_box = (
            torch.stack([target[key] for target in targets]) for key in ("point", "box", "is_box")
        )
        logits, iou = decode(self.sam, embedding, point, box, is_box)
        truth = torch.cat([target["prompted"] for target in targets])
        weight = torch.cat([target["weight"] for target in targets])
        return prompted_losses(logits, iou, truth, weight)

    def predict(self, images: Tensor, targets: Sequence[Target]) -> list[Target]:
        """{"masks": bool [n, H0, W0]} for each image, a mask for each of target["prompt_points"]
        float32 [n, 2]."""
        predictions = []
        for embedding, target in zip(self.encode(images, targets), targets, strict=True):
            point = target["prompt_points"][None]  # [1, n, 2]
            masks = torch.zeros(0, *target["original_size"], dtype=torch.bool)
            if point.shape[1]:
                box = torch.cat([point, point], dim=-1)
                is_box = torch.zeros(point.shape[:2], dtype=torch.bool, device=point.device)
                logits, _ = decode(self.sam, embedding[None], point, box, is_box)
                size = self.sam.image_encoder.img_size
                masks = (at_original_size(logits[:, 0], size, target) > 0).cpu()
            predictions.append({"masks": masks})
        return predictions

    def evaluation(self) -> "PromptableEvaluation":
        return PromptableEvaluation()


class PromptableEvaluation(Evaluation):
    """ "iou" and "dice": means over masks of torchmetrics' binary_jaccard_index and
    binary_f1_score."""

    def __init__(self) -> None:
        from torchmetrics import MeanMetric

        super().__init__(
            {
                name: MeanMetric(sync_on_compute=False).set_dtype(torch.float64)
                for name in ("iou", "dice")
            }
        )

    def update(self, prediction: Mapping[str, Any], truth: Mapping[str, Any]) -> None:
        from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index

        for mask, expected in zip(prediction["masks"], truth["masks"], strict=True):
            pair = torch.as_tensor(mask), torch.as_tensor(expected)
            self.metrics["iou"].update(binary_jaccard_index(*pair))
            self.metrics["dice"].update(binary_f1_score(*pair))


def _draw_prompts(target: Target, rng: np.random.Generator, mask_size: int) -> Target:
    """P = PROMPTS prompts: "point" [P, 2], "box" [P, 4], "is_box" [P], "prompted" float32
    [P, mask_size, mask_size], the share of each cell covered; "weight" [P] is 0 where the image
    has no mask left to ask for."""
    masks = torch.as_tensor(target["masks"])
    size = masks.shape[-2:]
    masks = masks[masks.any(-1).any(-1)]
    kept = {key: target[key] for key in ("files", "input_size", "original_size")}
    if not len(masks):
        return kept | {
            "point": torch.zeros(PROMPTS, 2),
            "box": torch.zeros(PROMPTS, 4),
            "is_box": torch.zeros(PROMPTS, dtype=torch.bool),
            "prompted": torch.zeros(PROMPTS, mask_size, mask_size),
            "weight": torch.zeros(PROMPTS),
        }
    chosen = masks[torch.from_numpy(rng.integers(len(masks), size=PROMPTS))]
    bound = np.array([size[1] - 1, size[0] - 1] * 2, np.float32)
    boxes = [np.clip(draw_box(rng, mask), 0, bound) for mask in chosen.numpy()]
    return kept | {
        "point": torch.from_numpy(np.stack([draw_point(rng, mask) for mask in chosen.numpy()])),
        "box": torch.from_numpy(np.stack(boxes)),
        "is_box": torch.from_numpy(rng.random(PROMPTS) < BOX_SHARE),
        "prompted": F.adaptive_avg_pool2d(chosen.float(), mask_size),
        "weight": torch.ones(PROMPTS),
    }


def _give_points(target: Target) -> Target:
    """Adds "prompt_points" float32 [n, 2], in the frame of the padded image."""
    truth = target["truth"]
    masks = torch.as_tensor(truth["masks"]).numpy()
    given = truth.get("points", torch.full((len(masks), 2), torch.nan))
    points = [
        point if point.isfinite().all() else torch.from_numpy(deepest_point(mask))
        for point, mask in zip(torch.as_tensor(given), masks, strict=True)
    ]
    (height, width), (new_height, new_width) = target["original_size"], target["input_size"]
    scale = torch.tensor([new_width / width, new_height / height])
    stacked = torch.stack(points).float() if points else torch.zeros(0, 2)
    return target | {"prompt_points": stacked * scale}
