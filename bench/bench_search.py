"""The channel search's scoring of candidates against a loop over SamPredictor.

Candidates are single pairs; each is scored on every image, at the image's own size. Images are
encoded beforehand, as both would do once. Limits: embeddings and targets cross memory once; the
products of the search's own decoder. `passes_per_second` is in the JSON's extra_info.
"""

import random

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vfmk
from bench.harness import Case, measure
from tests.channels.plain import predicted_ious
from vfmk.channels.records import Records
from vfmk.channels.scorers import SamScorer
from vfmk.channels.scoring import Scoring
from vfmk.data.demo_scenes import demo_scenes

# Model (ViT-B at random weights), pairs, images, and their size. A full search scores 4,032 pairs
# of the tiny SAM's channels, 65,280 of ViT-B's, on 50 images.
SMOKE_CASES = [("tiny", 3, 2, 64)]
CPU_CASES = [("tiny", 128, 2, 1024)]
CUDA_CASES = [("vit_b", 32, 50, 1024)]
TOLERANCE = {"cpu": 2e-5, "cuda": 1e-3}  # cuDNN's transposed convolutions are in TF32


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = CUDA_CASES if metafunc.config.getoption("device") == "cuda" else CPU_CASES
    if metafunc.config.getoption("smoke"):
        cases = SMOKE_CASES
    metafunc.parametrize(("model", "pairs", "images", "size"), cases)


def bench_search(benchmark, device, smoke, model, pairs, images, size):
    sam = vfmk.load_sam(model).to(device)
    samples = demo_scenes("train", images, size=size)
    scoring = Scoring(SamScorer(sam), samples, Records(None, {}, images), progress=False)
    generator = random.Random(0)
    drawn = torch.tensor([generator.sample(range(scoring.num_channels), 2) for _ in range(pairs)])

    def ours(pairs: Tensor, *embeddings: Tensor) -> Tensor:
        scoring.records.scores.clear()
        sets = [((i, j),) for i, j in pairs.tolist()]
        return torch.tensor(scoring.score(sets, scoring.report("", 0)), device=device)

    def loop(pairs: Tensor, *embeddings: Tensor) -> Tensor:
        sets = [((i, j),) for i, j in pairs.long().tolist()]
        ious = [
            predicted_ious(sam, sample, embedding, sets)
            for sample, embedding in zip(samples, embeddings, strict=True)
        ]
        return torch.stack(ious).mean(0).to(device)

    with FlopCounterMode(display=False) as counter:
        ours(drawn)
    bytes = sum(features.nbytes + size * size for features in scoring.features)
    case = Case(
        {"vfmk": ours, "SamPredictor": loop},
        loop,
        lambda: (drawn.to(device), *scoring.features),
        "forward",
        bytes,
        counter.get_total_flops(),
        TOLERANCE[device],
        reference_dtype=torch.float32,
    )
    passes = pairs * images
    benchmark.group = f"search {model}, {pairs} pairs on {images} images of {size} px"
    measure(benchmark, case, rounds=2 if device == "cuda" or smoke else 10)
    medians = benchmark.extra_info["median_seconds"]
    benchmark.extra_info["passes_per_second"] = {
        name: passes / medians[name] for name in case.contenders
    }
