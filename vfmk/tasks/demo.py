"""The demo: adapt the tiny SAM to real images in about a minute, and show what came of it."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import vfmk
from vfmk._files import write_whole
from vfmk.data.demo_scenes import demo_scenes
from vfmk.data.folder import load_samples
from vfmk.data.sample import Sample
from vfmk.tasks import pictures
from vfmk.tasks.controls import controlled_score, mean_iou, predict_logits
from vfmk.tasks.finetune import finetune

TRAIN_SAMPLES, HELD_OUT_SAMPLES = 400, 80
LONG_SIDE = 512  # pixels, to which larger images are shrunk; the tiny SAM sees 128
PICTURES = 8
TIMED_SIZE = (4, 64, 64, 64)
TIMED_ROUNDS = 15


@dataclass(frozen=True)
class DemoResult:
    """Mean IoU on held-out images, one point each, and what led to it."""

    frozen: float
    frozen_tuned_threshold: float
    disc: float
    adapted: float
    reloaded: float
    trainable_parameters: int
    all_parameters: int
    train_samples: int
    held_out_samples: int
    steps: int
    seed: int
    milliseconds: dict[str, dict[str, float]]


def run_demo(
    output: Path,
    *,
    data: Path | None = None,
    seed: int = 0,
    steps: int = 150,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> DemoResult:
    """Measure, fine-tune, measure again, save, load, time, and write a report into `output`.

    Args:
        output: folder for report.md, metrics.json, grid.png, loss.png and adapter/.
        data: a folder of images and masks (`vfmk.data.folder`), of which every second, by name, is
            held out, up to as many as the demo has of its own; without it, `vfmk.data.demo_scenes`.
        progress: called with the stage, steps done and steps in all.

    Raises:
        RuntimeError: the saved adapter, loaded into a fresh model, does not give the same masks.
    """
    output.mkdir(parents=True, exist_ok=True)
    train, held_out = _samples(data, seed)
    sam = vfmk.accelerate(vfmk.load_sam("tiny"))
    progress("measuring the frozen model", 0, 1)
    before = [predict_logits(sam, sample) > 0 for sample in held_out]
    controls = controlled_score(sam, train, held_out)

    torch.manual_seed(seed)
    adapted = vfmk.get_adapted_model(sam, vfmk.VFMAdapterConfig())
    trainable, total = adapted.get_nb_trainable_parameters()
    losses = []
    for loss in finetune(adapted, train, steps=steps, seed=seed):
        losses.append(loss)
        progress("fine-tuning the adapters", len(losses), steps)

    progress("measuring the adapted model", 0, 1)
    after = [predict_logits(adapted.sam, sample) > 0 for sample in held_out]
    adapted.save_pretrained(output / "adapter")
    fresh = vfmk.AdaptedSam.from_pretrained(
        vfmk.accelerate(vfmk.load_sam("tiny")), output / "adapter"
    )
    reloaded = [predict_logits(fresh.sam, sample) > 0 for sample in held_out]
    if not all(np.array_equal(a, b) for a, b in zip(after, reloaded, strict=True)):
        raise RuntimeError("run_demo: the saved adapter does not give the masks of the trained one")

    progress("timing the operator", 0, 1)
    result = DemoResult(
        frozen=controls.model,
        frozen_tuned_threshold=controls.model_tuned_threshold,
        disc=controls.disc,
        adapted=mean_iou(after, held_out),
        reloaded=mean_iou(reloaded, held_out),
        trainable_parameters=trainable,
        all_parameters=total,
        train_samples=len(train),
        held_out_samples=len(held_out),
        steps=steps,
        seed=seed,
        milliseconds=time_operator(),
    )
    shown = slice(PICTURES)
    pictures.draw_grid(output / "grid.png", held_out[shown], before[shown], after[shown])
    pictures.draw_loss(output / "loss.png", losses)
    metrics = {**asdict(result), "losses": losses}
    write_whole(output / "metrics.json", json.dumps(metrics, indent=1).encode())
    write_whole(output / "report.md", _report(result).encode())
    return result


def time_operator() -> dict[str, dict[str, float]]:
    """Median milliseconds of the operator and of the grouped convolution, measured in turn.

    fp32, [4, 64, 64, 64], 3×3, channels-last as the adapter calls it.
    """
    from torch.utils.benchmark import Timer

    input = torch.randn(TIMED_SIZE).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(*TIMED_SIZE[:2], 3, 3, requires_grad=True)
    contenders = {"vfmk": vfmk.ops.dynamic_depthwise_conv2d, "eager": _grouped_convolution}
    statements = {
        "forward": "with torch.no_grad(): f(input, weight)",
        "forward and backward": "torch.autograd.grad(f(input, weight).sum(), (input, weight))",
    }
    times: dict[str, dict[str, float]] = {}
    for direction, statement in statements.items():
        timers = {
            name: Timer(
                statement,
                globals={"f": f, "input": input, "weight": weight, "torch": torch},
                num_threads=torch.get_num_threads(),
            )
            for name, f in contenders.items()
        }
        rounds: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(TIMED_ROUNDS):
            for name, timer in timers.items():
                rounds[name].append(timer.timeit(5).median * 1e3)
        times[direction] = {name: statistics.median(values) for name, values in rounds.items()}
    return times


def _grouped_convolution(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = input.shape
    output = torch.nn.functional.conv2d(
        input.reshape(1, batch * channels, height, width),
        weight.reshape(batch * channels, 1, *weight.shape[2:]),
        padding="same",
        groups=batch * channels,
    )
    return output.view(batch, channels, height, width)


def _samples(data: Path | None, seed: int) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """For training, and held out."""
    if data is None:
        return (
            demo_scenes("train", TRAIN_SAMPLES, seed),
            demo_scenes("held_out", HELD_OUT_SAMPLES, seed),
        )
    samples = [sample.shrunk(LONG_SIDE) for sample in load_samples(data)]
    if len(samples) < 2:
        raise ValueError(f"run_demo: {data} has {len(samples)} image, at least 2 are needed")
    return samples[::2][:TRAIN_SAMPLES], samples[1::2][:HELD_OUT_SAMPLES]


def _report(result: DemoResult) -> str:
    share = 100 * result.trainable_parameters / result.all_parameters
    rows = "\n".join(
        f"| {direction} | {times['vfmk']:.3f} | {times['eager']:.3f}"
        f" | {times['eager'] / times['vfmk']:.1f}× |"
        for direction, times in result.milliseconds.items()
    )
    return f"""\
# The tiny SAM, adapted

{result.steps} steps on {result.train_samples} images (seed {result.seed});
{result.trainable_parameters:,} of {result.all_parameters:,} parameters trained ({share:.1f} %),
the base frozen. Mean IoU on {result.held_out_samples} held-out images, from one point each:

| | IoU |
|---|---|
| a plain disc, its radius tuned on the training images | {result.disc:.3f} |
| frozen model | {result.frozen:.3f} |
| frozen model, its threshold tuned on the training images | {result.frozen_tuned_threshold:.3f} |
| **adapted** | **{result.adapted:.3f}** |
| adapter saved and loaded into a fresh model | {result.reloaded:.3f} |

![image, truth, before, after](grid.png)

![loss](loss.png)

`dynamic_depthwise_conv2d`, fp32 {list(TIMED_SIZE)}, 3×3, channels-last, milliseconds:

| | vfmk | grouped convolution | |
|---|---|---|---|
{rows}
"""
