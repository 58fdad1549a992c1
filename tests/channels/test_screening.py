"""What `screened` chooses to score."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vfmk
from vfmk.channels import load_samples, search
from vfmk.channels.screening import Group, explore
from vfmk.data.demo_scenes import demo_scenes

DATA = Path(os.environ.get("VFMK_DATA", Path(__file__).parents[3] / "shared" / "data"))


def smooth_gains(channels):
    """Of a quadratic function of where the channel read lies, another for each overwritten one."""
    generator = torch.Generator().manual_seed(0)
    at = torch.randn(channels, 3, generator=generator, dtype=torch.float64)
    slope = torch.randn(channels, 3, generator=generator, dtype=torch.float64)
    moved = at - at[:, None]  # [overwritten, read, 3]
    linear = (moved * slope[:, None]).sum(-1)
    squared = moved.square().sum(-1)
    return linear - 0.5 * squared, linear, squared


def best_rows_found(found, gains):
    """Of the ten overwritten channels that gain most, those whose best read was scored."""
    best = gains.amax(1)
    rows = best.argsort(descending=True)[:10]
    return int((found.nan_to_num(-torch.inf).amax(1) == best)[rows].sum())


def test_finds_the_best_of_what_is_smooth():
    """From estimates that are half noise."""
    gains, estimates, squared = smooth_gains(40)
    noise = torch.randn(40, 40, generator=torch.Generator().manual_seed(1)).double()
    estimates += estimates.std() * noise
    estimates.fill_diagonal_(0)
    squared /= squared.median()
    found, scored = torch.full_like(gains, torch.nan), []

    def score(places):
        scored.extend(places)
        return {place: float(gains[place]) for place in places}

    groups = [Group(lambda points: squared[:, points], channel) for channel in range(40)]
    explore(score, found, estimates, groups, budget=160)
    assert len(scored) == len(set(scored)) == 160
    assert all(i != j for i, j in scored)
    assert (~found.isnan()).sum() == 160
    by_estimate = torch.full_like(gains, torch.nan)
    first = estimates.flatten().argsort(descending=True)[:160]
    by_estimate.flatten()[first] = gains.flatten()[first]
    assert best_rows_found(found, gains) >= 8 > best_rows_found(by_estimate, gains)


def test_stops_when_all_is_known():
    gains = torch.full((3, 3), torch.nan, dtype=torch.float64)
    groups = [Group(lambda points: torch.ones(3, len(points)).double(), i) for i in range(3)]
    scored = []

    def score(places):
        scored.extend(places)
        return dict.fromkeys(places, 0.0)

    explore(score, gains, torch.zeros(3, 3, dtype=torch.float64), groups, budget=100)
    assert sorted(scored) == [(i, j) for i in range(3) for j in range(3) if i != j]


def lesions(begin):
    folder = DATA / "isic2016"
    if not folder.is_dir():
        pytest.skip(f"no photographs in {folder}; VFMK_DATA says where they are")
    return load_samples(folder)[begin : begin + 50]


@pytest.mark.slow
@pytest.mark.parametrize(
    "samples",
    [
        pytest.param(lambda: lesions(0), id="lesions 0-49"),
        pytest.param(lambda: lesions(50), id="lesions 50-99"),
        pytest.param(lambda: demo_scenes("train", 50), id="demo scenes"),
        pytest.param(lambda: demo_scenes("held_out", 50, seed=3), id="demo scenes, others"),
    ],
)
def test_finds_what_exhaustive_finds_in_a_tenth_of_the_passes(samples):
    """Minutes each: 252,300 passes."""
    shrunk = [sample.shrunk(128) for sample in samples()]
    small = [replace(sample, mask=sample.mask.copy()) for sample in shrunk]
    sam = vfmk.load_sam("tiny")
    exhaustive = search(sam, small, progress=False)
    screened = search(sam, small, strategy="screened", progress=False)
    assert len(set(screened.candidates) & set(exhaustive.candidates)) >= 9
    assert screened.best_score > exhaustive.best_score - 0.001
    assert screened.passes <= 0.1 * exhaustive.passes
