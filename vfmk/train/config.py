"""How a run is trained; the defaults are the recipe of METHODS.md, section 1."""

import math
from dataclasses import dataclass

SCHEDULES = ("step", "cosine")
PRECISIONS = ("no", "bf16", "fp16")
MILESTONES = (8 / 12, 11 / 12)  # shares of the run after which "step" divides the rate by 10


@dataclass(frozen=True)
class TrainConfig:
    """A field out of range is a ValueError that names it.

    Args:
        epochs: passes over the training set; a fraction stops inside one.
        batch_size: images for each process and backward pass.
        accumulation: backward passes for each step of the optimiser.
        learning_rate, weight_decay, betas: of AdamW.
        schedule: "step" divides the rate by 10 at 8/12 and at 11/12 of the run; "cosine" lets it
            fall to 0.
        warmup_steps: over which the rate rises from 0 first.
        max_grad_norm: to which the gradient is clipped.
        precision: of autocast: "no", "bf16" or "fp16" (with loss scaling).
        ema: decay of the moving average of the weights, which is then what is evaluated and kept as
            the best; 0 for none.
        eval_every: epochs between evaluations; there is one at the end in any case.
        checkpoint_every: steps between checkpoints; there is one after each evaluation too.
        workers: processes that load images.
        seed: of weights, of the order of images, of augmentation, of dropout.
    """

    epochs: float = 12
    batch_size: int = 2
    accumulation: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "step"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    precision: str = "no"
    ema: float = 0.0
    eval_every: float = 1.0
    checkpoint_every: int = 200
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for field in ("batch_size", "accumulation", "checkpoint_every"):
            self._require(field, getattr(self, field) >= 1, "at least 1")
        for field in ("warmup_steps", "workers", "weight_decay", "seed"):
            self._require(field, getattr(self, field) >= 0, "0 or more")
        for field in ("epochs", "learning_rate", "max_grad_norm", "eval_every"):
            self._require(field, 0 < getattr(self, field) < math.inf, "a positive number")
        self._require(
            "betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two in [0, 1)"
        )
        self._require("ema", 0 <= self.ema < 1, "in [0, 1)")
        self._require("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._require("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, of a run of `steps`."""
        warm_up = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.schedule == "cosine":
            return self.learning_rate * warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))
        return (
            self.learning_rate * warm_up * 0.1 ** sum(step >= share * steps for share in MILESTONES)
        )

    def _require(self, field: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(
                f"TrainConfig: {field} must be {expected}, got {getattr(self, field)!r}"
            )
