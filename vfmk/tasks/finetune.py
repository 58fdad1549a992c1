"""Fine-tuning an adapted SAM for promptable segmentation."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from vfmk.data.records import to_record, to_target
from vfmk.data.sample import Sample
from vfmk.sam.adapt import AdaptedSam
from vfmk.tasks.losses import mask_loss

LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1


def finetune(
    adapted: AdaptedSam,
    samples: Sequence[Sample],
    *,
    steps: int,
    batch_size: int = 8,
    seed: int = 0,
) -> Iterator[float]:
    """Train what has gradients; yields the loss of every step, and leaves eval mode behind.

    AdamW; the learning rate rises over a tenth of the steps and falls by a cosine. Each sample's
    own prompt, its single-mask output, half of the images mirrored.

    Raises:
        ValueError: nothing to train, or no samples.
        FloatingPointError: a loss that is not finite, with the step and the samples.
    """
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    if not parameters or not samples:
        missing = "parameters that require grad" if samples else "samples"
        raise ValueError(f"finetune: there are no {missing}")
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)  # of dropout
    adapted.train()
    try:
        for step in range(steps):
            batch = [
                _mirrored(samples[i]) if rng.random() < 0.5 else samples[i]
                for i in rng.integers(len(samples), size=batch_size)
            ]
            loss = _loss(adapted, batch)
            if not loss.isfinite():
                names = ", ".join(sample.id for sample in batch)
                raise FloatingPointError(f"finetune: loss {loss} at step {step}, samples {names}")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            yield loss.item()
    finally:
        adapted.eval()


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step, counted from 0."""
    warm_up = max(1, steps // 10)
    return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _loss(adapted: AdaptedSam, batch: Sequence[Sample]) -> torch.Tensor:
    records = [to_record(adapted.sam, sample) for sample in batch]
    logits = torch.cat(
        [output["low_res_logits"] for output in adapted(records, return_masks=False)]
    )  # [B, 1, h, w]
    targets = [
        to_target(adapted.sam, sample, record["image"].shape[-2:], logits.shape[-2:])
        for sample, record in zip(batch, records, strict=True)
    ]
    return mask_loss(logits[:, 0], torch.stack(targets)).mean()


def _mirrored(sample: Sample) -> Sample:
    width = sample.mask.shape[1]
    points = np.stack([width - 1 - sample.points[:, 0], sample.points[:, 1]], axis=1)
    return Sample(
        sample.id, sample.image[:, ::-1].copy(), sample.mask[:, ::-1].copy(), points, sample.labels
    )
