"""Losses for masks given as logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2
FOCAL_WEIGHT = 5  # SAM's 20 keeps a small model from starting at all
DICE_SMOOTHING = 1.0  # pixels


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy + Dice + 5 x focal (Lin et al., 2017), in float32 or wider.

    A target between 0 and 1 is the share of the pixel covered; the focal term's modulating factor
    is then |target - probability|, which for 0 and 1 is the paper's 1 - p_t.

    Args:
        logits: [..., H, W] of any floating dtype.
        target: [..., H, W], bool or in 0..1; broadcasts against `logits`.

    Returns:
        float32 (float64 for float64 logits) [...], one loss for each mask.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits, target = torch.broadcast_tensors(logits.to(dtype), target.to(dtype))
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")

    overlap = (probability * target).sum((-2, -1))
    total = (probability + target).sum((-2, -1))
    dice = 1 - (2 * overlap + DICE_SMOOTHING) / (total + DICE_SMOOTHING)

    balance = FOCAL_ALPHA * target + (1 - FOCAL_ALPHA) * (1 - target)
    focal = balance * (target - probability).abs() ** FOCAL_GAMMA * cross_entropy
    return (cross_entropy + FOCAL_WEIGHT * focal).mean((-2, -1)) + dice


def prompted_losses(
    logits: Tensor, iou: Tensor, target: Tensor, weight: Tensor | None = None
) -> dict[str, Tensor]:
    """What SAM's decoder learns from: scalars "mask" and "iou", in float32, means over prompts.

    Token 0 is the single mask; of the other three only the best one learns, at half weight. The
    IoU head learns the true IoU of each mask, by squared error (Kirillov et al., 2023).

    Args:
        logits: [K, 4, h, w], all mask tokens'.
        iou: [K, 4], predicted.
        target: [K, h, w], in 0..1.
        weight: [K], of each prompt; 0 leaves it out. None: 1 for all.
    """
    logits, target = logits.float(), target[:, None]
    per_mask = mask_loss(logits, target)  # [K, 4]
    predicted, truth = logits.detach() > 0, target > 0.5
    intersection = (predicted & truth).sum((-2, -1))
    true_iou = intersection / (predicted | truth).sum((-2, -1)).clamp(min=1)
    mask = per_mask[:, 0] + 0.5 * per_mask[:, 1:].min(dim=1).values
    iou_error = F.mse_loss(iou.float(), true_iou, reduction="none").mean(1)
    if weight is not None:
        mask, iou_error = weight * mask, weight * iou_error
    return {"mask": mask.mean(), "iou": iou_error.mean()}


def semantic_losses(logits: Tensor, target: Tensor, ignore: int = 255) -> dict[str, Tensor]:
    """Scalars "cross_entropy" and "dice" in float32: for each image over its labelled pixels, then
    the mean over images, so that a batch in parts gives the mean of its parts.

    Args:
        logits: [B, K, H, W].
        target: int64 [B, H, W], a class in 0..K-1 or `ignore`.
    """
    logits = logits.float()
    labelled = target != ignore
    pixels = labelled.sum((-2, -1)).clamp(min=1)
    entropy = F.cross_entropy(logits, target, ignore_index=ignore, reduction="none")
    probability = logits.softmax(1)
    # Bool, and products that nothing keeps: with many classes [B, K, H, W] is what takes memory.
    classes = torch.arange(logits.shape[1], device=target.device)[:, None, None]
    truth = (target[:, None] == classes) & labelled[:, None]
    overlap = (probability * truth).sum((-2, -1))
    total = (probability * labelled[:, None]).sum((-2, -1)) + truth.sum((-2, -1))
    dice = 1 - (2 * overlap + DICE_SMOOTHING) / (total + DICE_SMOOTHING)  # [B, K]
    return {"cross_entropy": (entropy.sum((-2, -1)) / pixels).mean(), "dice": dice.mean()}
