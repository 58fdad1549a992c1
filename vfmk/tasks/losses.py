"""The loss for masks given as logits."""

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
