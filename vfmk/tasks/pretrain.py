"""Pretrains the tiny SAM on generated scenes: python -m vfmk.tasks.pretrain --out FILE

Two stages, four fifths and one fifth of the steps: scattered objects, then half of the scenes
close-ups of one large object. The order of the scenes is a function of the seed and the step, so a
run that was stopped goes on from its checkpoint as if it had not been. At the end it prints the
scores of vfmk.tasks.score_tiny.
"""

import argparse
import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import MofNCompleteColumn, Progress
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vfmk._files import write_whole
from vfmk.data.scenes import generate_scene
from vfmk.sam.load import build_tiny_sam, load_sam
from vfmk.tasks.losses import prompted_losses
from vfmk.tasks.prompts import decode, draw_box, draw_point
from vfmk.tasks.score_tiny import score_tiny

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

BATCH_SIZE = 16
PROMPTS = 4  # for each image
BOX_SHARE = 0.3
LEARNING_RATE = 1e-3
WARMUP_STEPS = 200
MAX_GRAD_NORM = 1.0
CHECKPOINT_EVERY = 100


class Prompted(NamedTuple):
    """An image and P prompts, each a point or a box; batched, every field gains a first axis."""

    image: Tensor  # uint8 [3, H, W]
    target: Tensor  # float32 [P, h, w] at the decoder's resolution, the share covered
    point: Tensor  # float32 [P, 2], (x, y) in pixels
    box: Tensor  # float32 [P, 4], (x0, y0, x1, y1) in pixels
    is_box: Tensor  # bool [P]


class PromptedScenes(Dataset[Prompted]):
    """Scenes of `vfmk.data.scenes` with prompts drawn for them; index is the scene's.

    From `first_close_up` on, every second scene is a close-up.
    """

    def __init__(self, seed: int, image_size: int, mask_size: int, first_close_up: int) -> None:
        self.seed, self.image_size, self.mask_size = seed, image_size, mask_size
        self.first_close_up = first_close_up

    def __getitem__(self, index: int) -> Prompted:
        rng = np.random.default_rng((self.seed, index, 1))
        close_up = index >= self.first_close_up and index % 2 == 1
        scene = generate_scene(self.seed, index, self.image_size, close_up=close_up)
        masks = scene.masks[rng.integers(len(scene.masks), size=PROMPTS)]
        return Prompted(
            image=torch.from_numpy(scene.image).permute(2, 0, 1),
            target=F.adaptive_avg_pool2d(torch.from_numpy(masks).float(), self.mask_size),
            point=torch.from_numpy(np.stack([draw_point(rng, mask) for mask in masks])),
            box=torch.from_numpy(np.stack([draw_box(rng, mask) for mask in masks])),
            is_box=torch.from_numpy(rng.random(PROMPTS) < BOX_SHARE),
        )


def predict(sam: "Sam", batch: Prompted) -> tuple[Tensor, Tensor]:
    """Every mask token's logits [B*P, 4, h, w] and predicted IoU [B*P, 4], differentiable."""
    pixels = (batch.image - sam.pixel_mean) / sam.pixel_std
    embedding = sam.image_encoder(pixels)
    return decode(sam, embedding, batch.point, batch.box, batch.is_box)


def close_up_start(steps: int) -> int:
    """The step at which the second stage begins."""
    return steps - steps // 5


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up and a cosine to zero; in the second stage a cosine again, half as high."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    second = close_up_start(steps)
    start, end, peak = (
        (WARMUP_STEPS, second, LEARNING_RATE)
        if step < second
        else (second, steps, LEARNING_RATE / 2)
    )
    return peak * 0.5 * (1 + math.cos(math.pi * (step - start) / (end - start)))


def pretrain(steps: int, seed: int, checkpoint: Path) -> "Sam":
    """Trains, from `checkpoint` on if it exists, and returns the model in eval mode."""
    torch.manual_seed(seed)
    sam = build_tiny_sam()
    optimizer = torch.optim.AdamW(sam.parameters(), lr=LEARNING_RATE)
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        sam.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    mask_size = 4 * sam.prompt_encoder.image_embedding_size[0]
    loader = DataLoader(
        PromptedScenes(
            seed, sam.image_encoder.img_size, mask_size, close_up_start(steps) * BATCH_SIZE
        ),
        batch_sampler=[
            list(range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)) for step in range(start, steps)
        ],
        num_workers=1,
        prefetch_factor=8,
    )
    recent: list[float] = []
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        task = progress.add_task("pretraining", total=steps, completed=start)
        for step, batch in enumerate(loader, start):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
            with torch.autocast("cpu", torch.bfloat16):
                logits, iou = predict(sam, batch)
            parts = prompted_losses(logits, iou, batch.target.flatten(0, 1))
            loss = parts["mask"] + parts["iou"]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(sam.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            recent.append(loss.item())
            progress.advance(task)
            done = step + 1
            if done % CHECKPOINT_EVERY == 0 or done == steps:
                progress.console.print(f"step {done}: loss {np.mean(recent):.4f}")
                recent.clear()
                state = {
                    "model": sam.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": done,
                }
                buffer = io.BytesIO()
                torch.save(state, buffer)
                write_whole(checkpoint, buffer.getvalue())
    return sam.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file, fp16")
    parser.add_argument("--checkpoint", type=Path, help="default: OUT with .checkpoint")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    checkpoint = args.checkpoint or args.out.with_suffix(".checkpoint")
    sam = pretrain(args.steps, args.seed, checkpoint)
    half = {key: value.half().contiguous() for key, value in sam.state_dict().items()}
    write_whole(args.out, save(half))
    print(json.dumps(score_tiny(load_sam("tiny", args.out)), indent=2))


if __name__ == "__main__":
    main()
