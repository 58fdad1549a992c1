"""Parameter-free fine-tuning from images to report: the search, its controls, one test."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vfmk import channels
from vfmk._files import write_whole
from vfmk.channels import ChannelMap, SearchResult
from vfmk.channels.channel_map import Pair
from vfmk.channels.digest import digest_of_samples
from vfmk.channels.processes import failing_together, rank
from vfmk.data.sample import Sample
from vfmk.tasks import pictures
from vfmk.tasks.controls import Controls, binary_iou, disc, tuned_controls

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

SCORES = "scores.jsonl"
PICTURES = 8
BOOTSTRAPS = 2000
NO_TEST = """
No test samples were given: whether the map helps on other images, and how the controls do there, is
not known.

![image, truth, before, after, of search samples](grid.png)
"""


@dataclass(frozen=True)
class TestScore:
    """Mean IoU on samples that the map was not chosen on, and what to hold it against.

    Attributes:
        frozen, remapped: without and with the map.
        gain_interval: of remapped − frozen, 95 % of bootstrap samples of the test images.
        frozen_tuned_threshold: without the map, the mask at `threshold`.
        disc: a plain disc around the point, of `radius`.
        threshold, radius: of the logits, and as a share of the longer side; what suits the search
            samples best.
    """

    samples: int
    frozen: float
    remapped: float
    gain_interval: tuple[float, float]
    frozen_tuned_threshold: float
    disc: float
    threshold: float
    radius: float


def run_search(
    sam: "Sam",
    search_samples: Sequence[Sample],
    test_samples: Sequence[Sample],
    output: Path,
    *,
    facts: dict[str, Any],
    **options: Any,
) -> None:
    """Search on `search_samples`, evaluate the map once on `test_samples` if there are any, and
    write into `output` scores.jsonl, map.json, metrics.json, report.md and pictures.

    With torch.distributed initialised every process calls this; the first one evaluates and writes,
    and needs the test samples alone.

    Args:
        facts: written into map.json, as "dataset" and "backend" of the authors' files.
        options: of `vfmk.channels.search`.

    Raises:
        ValueError: an image is searched and tested on; as `vfmk.channels.search`.
    """
    with failing_together(ValueError):
        _check_apart(search_samples, test_samples)
    output.mkdir(parents=True, exist_ok=True)
    result = channels.search(sam, search_samples, output=output / SCORES, **options)
    if rank() > 0:
        return
    result.best.save(
        output / "map.json",
        **facts,
        miou=result.best_score,
        delta=result.best_score - result.baseline,
        samples=len(search_samples),
    )
    gains = (result.singles - result.baseline).numpy()
    pictures.draw_gains(output / "gains.png", gains)
    pictures.draw_heat_map(output / "heat_map.png", gains)
    controls = tuned_controls(sam, search_samples)
    test = None
    if test_samples:
        test = _evaluate(sam, result.best, controls, test_samples, output)
    else:
        shown = search_samples[:PICTURES]
        masks = [_masks_without_and_with(sam, result.best, sample) for sample in shown]
        pictures.draw_grid(output / "grid.png", shown, *zip(*masks, strict=True))
    metrics = {
        "search_samples": len(search_samples),
        "baseline": result.baseline,
        "baseline_tuned_threshold": controls.tuned_threshold,
        "best_score": result.best_score,
        "pairs": result.best.pairs,
        "candidates": result.candidates,
        "passes": result.passes,
        "known_scores": result.known,
        "rejected_in_error": result.audit,
        "test": test and asdict(test),
    }
    write_whole(output / "metrics.json", json.dumps(metrics, indent=1).encode())
    write_whole(output / "report.md", _report(result, len(search_samples), controls, test).encode())


def run_apply(
    sam: "Sam",
    map: ChannelMap,
    search_samples: Sequence[Sample],
    test_samples: Sequence[Sample],
    output: Path,
) -> None:
    """Evaluate a map, and write metrics.json, report.md and grid.png into `output`.

    Raises:
        FileExistsError: `output` is the folder of a search, which has a report of its own.
        ValueError: no test samples, or one whose image is searched on; the map is for another
            number of channels.
    """
    if not test_samples:
        raise ValueError(
            f"apply: there are no samples to evaluate on beyond the {len(search_samples)} searched"
            " on; name others by --data"
        )
    _check_apart(search_samples, test_samples)
    embedded = sam.prompt_encoder.embed_dim
    if map.num_channels != embedded:
        raise ValueError(
            f"apply: the map is for {map.num_channels} channels, the embedding has {embedded}"
        )
    if (output / SCORES).exists():
        raise FileExistsError(f"apply: {output} holds a search; choose another folder by --out")
    output.mkdir(parents=True, exist_ok=True)
    controls = tuned_controls(sam, search_samples)
    test = _evaluate(sam, map, controls, test_samples, output)
    metrics = {"pairs": map.pairs, "test": asdict(test)}
    write_whole(output / "metrics.json", json.dumps(metrics, indent=1).encode())
    report = (
        f"# Channels overwritten\n\nOverwritten by read: {_listed(map.pairs)}\n{_test_report(test)}"
    )
    write_whole(output / "report.md", report.encode())


def _check_apart(search_samples: Sequence[Sample], test_samples: Sequence[Sample]) -> None:
    """A score on images that the map was chosen on would flatter it, whatever their names."""
    if not test_samples:
        return
    searched = {digest_of_samples([sample.image]) for sample in search_samples}
    both = [s.id for s in test_samples if digest_of_samples([s.image]) in searched]
    if both:
        raise ValueError(
            f"the images of {len(both)} of {len(test_samples)} test samples are searched on too,"
            f" such as {both[0]!r}; test on others"
        )


def _evaluate(
    sam: "Sam",
    map: ChannelMap,
    controls: Controls,
    test_samples: Sequence[Sample],
    output: Path,
) -> TestScore:
    """Scores without and with the map, and their picture. Each test image is encoded once."""
    threshold, radius, _ = controls
    masks: list[tuple[np.ndarray, np.ndarray]] = []  # before and after, of those shown
    scores = []
    for sample in test_samples:
        frozen, remapped = _logits_without_and_with(sam, map, sample)
        predicted = (
            frozen > sam.mask_threshold,
            remapped > sam.mask_threshold,
            frozen > threshold,
            disc(sample, radius),
        )
        scores.append([binary_iou(mask, sample.mask) for mask in predicted])
        if len(masks) < PICTURES:
            masks.append(predicted[:2])
    before, after = zip(*masks, strict=True)
    pictures.draw_grid(output / "grid.png", test_samples[:PICTURES], before, after)
    by_mask = np.array(scores).T
    frozen_mean, remapped_mean, tuned_mean, disc_mean = by_mask.mean(1).tolist()
    return TestScore(
        samples=len(test_samples),
        frozen=frozen_mean,
        remapped=remapped_mean,
        gain_interval=_bootstrap_interval(by_mask[1] - by_mask[0]),
        frozen_tuned_threshold=tuned_mean,
        disc=disc_mean,
        threshold=threshold,
        radius=radius,
    )


@torch.no_grad()
def _logits_without_and_with(
    sam: "Sam", map: ChannelMap, sample: Sample
) -> tuple[np.ndarray, np.ndarray]:
    """As `predict_logits`, of the model and of `channels.apply(model, map)`."""
    from segment_anything import SamPredictor

    predictor = SamPredictor(sam)
    predictor.set_image(sample.image)
    prompt = {"point_coords": sample.points, "point_labels": sample.labels}
    options = {"multimask_output": False, "return_logits": True}
    without, _, _ = predictor.predict(**prompt, **options)
    predictor.features = predictor.features[:, map.index.to(predictor.features.device)]
    with_map, _, _ = predictor.predict(**prompt, **options)
    return without[0], with_map[0]


def _masks_without_and_with(
    sam: "Sam", map: ChannelMap, sample: Sample
) -> tuple[np.ndarray, np.ndarray]:
    frozen, remapped = _logits_without_and_with(sam, map, sample)
    return frozen > sam.mask_threshold, remapped > sam.mask_threshold


def _bootstrap_interval(gains: np.ndarray) -> tuple[float, float]:
    random = np.random.default_rng(0)
    drawn = random.integers(len(gains), size=(BOOTSTRAPS, len(gains)))
    low, high = np.percentile(gains[drawn].mean(1), (2.5, 97.5))
    return float(low), float(high)


def _report(result: SearchResult, samples: int, controls: Controls, test: TestScore | None) -> str:
    audit = ""
    if result.audit is not None:
        audit = f"\nRejected pairs looked at that should have been kept: {_listed(result.audit)}.\n"
    return f"""\
# Channels searched

{samples} samples, {result.passes:,} decoder passes{_known(result)}.
Overwritten by read: {_listed(result.best.pairs)}

| on the search samples | IoU |
|---|---|
| frozen model | {result.baseline:.4f} |
| frozen model, its threshold tuned on them ({controls.threshold:.2f}) \
| {controls.tuned_threshold:.4f} |
| **channels overwritten** | **{result.best_score:.4f}** |

Gain {result.best_score - result.baseline:+.4f}, on the samples that it was chosen on.
{audit}
![gain of each pair](gains.png)

![gain by channel overwritten and channel read](heat_map.png)
{_test_report(test) if test else NO_TEST}"""


def _known(result: SearchResult) -> str:
    return f", and {result.known:,} scores of an earlier run" if result.known else ""


def _listed(pairs: Sequence[Pair]) -> str:
    return " ".join(f"{i}:{j}" for i, j in pairs) or "none"


def _test_report(test: TestScore) -> str:
    low, high = test.gain_interval
    return f"""
| on {test.samples} test samples | IoU |
|---|---|
| a plain disc, its radius tuned on the search samples ({test.radius:.2f}) | {test.disc:.4f} |
| frozen model | {test.frozen:.4f} |
| frozen model, its threshold tuned on the search samples ({test.threshold:.2f}) \
| {test.frozen_tuned_threshold:.4f} |
| **channels overwritten** | **{test.remapped:.4f}** |

Gain {test.remapped - test.frozen:+.4f}; 95 % of bootstrap samples of the test images give between
{low:+.4f} and {high:+.4f}.

![image, truth, before, after](grid.png)
"""
