"""What `screened` chooses to score."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vfmk
from vfmk.channels import load_samples, search
from vfmk.channels.dropping import Rule, looks, shuffled
from vfmk.channels.progress import Report
from vfmk.channels.race import Race
from vfmk.channels.records import Raced
from vfmk.channels.screening import Group, bars_of, explore
from vfmk.data.demo_scenes import demo_scenes
from vfmk.tasks.score_tiny import unseen_scenes

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
    scored = []

    def race(places, bars, factor):
        scored.extend(places)
        return {place: Raced(float(gains[place]), 0.0, 1) for place in places}

    groups = [Group(lambda points: squared[:, points], channel) for channel in range(40)]
    first = [(channel, int(estimates[channel].argmax())) for channel in range(40)]
    found = explore(race, estimates[..., None], groups, first, top=10, samples=1, budget=160)
    assert len(scored) == len(set(scored)) == 160
    assert all(i != j for i, j in scored)
    assert (~found.isnan()).sum() == 160
    by_estimate = torch.full_like(gains, torch.nan)
    highest = estimates.flatten().argsort(descending=True)[:160]
    by_estimate.flatten()[highest] = gains.flatten()[highest]
    assert best_rows_found(found, gains) >= 8 > best_rows_found(by_estimate, gains)


def test_stops_when_all_is_known_and_keeps_what_was_not_dropped():
    groups = [Group(lambda points: torch.ones(3, len(points)).double(), i) for i in range(3)]
    scored = []

    def race(places, bars, factor):
        assert all(bar == (0 if scored else -torch.inf) for bar in bars)
        scored.extend(places)
        return {(i, j): Raced(0.0, 0.1, 5 if j > 0 else 3) for i, j in places}

    first, features = [(0, 1), (1, 2), (2, 1)], torch.zeros(3, 3, 1).double()
    found = explore(race, features, groups, first, top=3, samples=5, budget=100)
    assert sorted(scored) == [(i, j) for i in range(3) for j in range(3) if i != j]
    assert (~found.isnan()).nonzero().tolist() == [[0, 1], [0, 2], [1, 2], [2, 1]]


def test_a_bar_is_the_last_of_the_top_or_the_groups_best():
    gains = torch.tensor([[1.0, 5.0], [2.0, torch.nan], [torch.nan, 3.0], [torch.nan, torch.nan]])
    assert bars_of(gains, 2).tolist() == [5, 3, 3, 3]
    assert bars_of(gains, 5).tolist() == [5, 2, 3, -torch.inf]


def test_a_rule_drops_what_is_three_errors_below_its_bar():
    """s² of 4 samples, of variance 3, and of the usual 7, of weight 3 and 5: 5.5."""
    generator = torch.Generator().manual_seed(0)
    controls = torch.randn(1, 16, generator=generator, dtype=torch.float64)
    seen = torch.tensor([3, 0, 8, 15])
    gains = 2 + controls[:, seen] - controls.mean() + torch.tensor([[-1.5, 1.5, 1.5, -1.5]])
    error = (5.5 * (1 / 4 - 1 / 16)) ** 0.5
    for bar, dropped in ((2 + 2.999 * error, False), (2 + 3.001 * error, True)):
        rule = Rule(torch.tensor([bar]).double(), controls, torch.tensor([7.0]).double())
        gain, spread = rule.estimates(gains, seen)
        torch.testing.assert_close(gain, torch.tensor([2.0]).double())
        torch.testing.assert_close(spread, torch.tensor([3.0]).double().sqrt())
        assert rule.drops(gain, spread, torch.tensor([4.0])).item() is dropped
    unknown = rule._replace(variances=torch.tensor([torch.nan]))
    assert not unknown.drops(gain, spread, torch.tensor([4.0])).item()


def wrongly_dropped(gains, usual):
    """The share of candidates that race, 10 to 45 of 50 samples, though they reach their bar."""
    samples = gains.shape[1]
    bars = gains.mean(1)
    rule = Rule(bars, torch.zeros_like(gains), torch.full_like(bars, usual))
    dropped = torch.zeros(len(gains), dtype=torch.bool)
    order = shuffled(samples)
    for end in looks(samples)[:-1]:
        gain, spread = rule.estimates(gains[:, order[:end]], order[:end])
        dropped |= rule.drops(gain, spread, torch.full_like(gain, end))
    return float(dropped.double().mean())


def test_few_that_reach_their_bar_are_dropped():
    """Where the usual variance is the true one; gains that are normal, or 0 on four of five."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20000, 50, generator=generator, dtype=torch.float64)
    sparse = normal * (torch.rand(20000, 50, generator=generator) < 0.2)
    for gains, most in ((normal, 0.02), (sparse, 0.04)):
        share = wrongly_dropped(gains, float(gains.var()))
        assert 0 < share < most
        assert wrongly_dropped(gains, 0.0) > 2 * share


def test_what_the_first_order_does_not_see_is_not_dropped_for_it(monkeypatch):
    """Gains on one sample of five, a gradient of 0: they look alike on the first ten."""
    report = Report("pairs", 1, False)
    rules = []

    def run(sets, rule):
        rules.append(rule)
        return [Raced(0.0, 0.3, 50) for _ in sets]

    first_order = torch.zeros(4, 50, dtype=torch.float64)
    first_order[0, ::2] = 1.0
    race = Race(None, lambda place: (place,), lambda places: first_order, report)
    monkeypatch.setattr(race, "_run", run)
    places = [(0, 1), (1, 2), (2, 3), (3, 4)]
    for _ in range(2):
        race(places, [1e-12] * 4, 1.0)
    known, same = rules[1], torch.zeros(4, dtype=torch.float64)
    assert rules[0].variances.isnan().all()
    assert known.variances[0] > known.variances[1]
    torch.testing.assert_close(known.variances[1:], torch.full((3,), 0.09).double())
    assert not known.drops(same, same, torch.full((4,), 10.0)).any()


def test_most_channels_dead():
    """The whole budget is spent, though the median distance between channels is 0."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 2, 2, generator=generator)
    mixed = torch.zeros(16, 3)
    mixed[:4] = 10 * torch.randn(4, 3, generator=generator)
    target = torch.randn(16, generator=generator)

    def encoder(image):
        return torch.einsum("cd,ndhw->nchw", mixed, image)

    def negative_mse(features, sample):
        return -(features.mean((2, 3)) - target).square().mean(1)

    samples = [SimpleNamespace(image=image) for image in images]
    options = {"score_fn": negative_mse, "top_n": 4, "progress": False}
    exhaustive = search(encoder, samples, **options)
    screened = search(encoder, samples, strategy="screened", keep=0.5, **options)
    assert screened.passes > 0.5 * 16 * 15 * len(samples)
    assert screened.best_score == exhaustive.best_score


def test_a_promise_that_is_not_finite_is_an_error():
    def distances(points):
        return torch.full((3, len(points)), 1.0 if len(points) == 1 else torch.nan).double()

    groups, features = [Group(distances, 0)] * 2, torch.zeros(2, 3, 1).double()

    def race(places, bars, factor):
        return {place: Raced(0.0, 0.1, 5) for place in places}

    with pytest.raises(ValueError, match="search: what a candidate promises is not finite"):
        explore(race, features, groups, [(0, 1), (1, 2)], top=2, samples=5, budget=100)


@pytest.mark.parametrize("seed", [0, 4, 6])
def test_a_tenth_of_the_passes_finds_a_classifiers_candidates(seed):
    """Of 64 channels that are mixtures of 12, read by a head that errs. Of the seeds 0 to 39 these
    (4 and 6) miss one candidate of ten, 24 misses two and the best subset by 0.014."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    head = normal(64, 3) / 8
    features = normal(50, 12) @ normal(12, 64) + 0.5 * normal(50, 64)
    labels = (features @ (head + 0.3 * normal(64, 3) / 8)).argmax(1)

    def likelihood(features, sample):
        return (features @ head).softmax(-1)[:, sample.label]

    samples = [
        SimpleNamespace(image=image, label=int(label))
        for image, label in zip(features, labels, strict=True)
    ]
    assert_found_in_a_tenth(lambda image: image, samples, score_fn=likelihood)


def assert_found_in_a_tenth(model, samples, **options):
    exhaustive = search(model, samples, progress=False, **options)
    screened = search(model, samples, strategy="screened", progress=False, **options)
    assert len(set(screened.candidates) & set(exhaustive.candidates)) >= 9
    assert screened.best_score > exhaustive.best_score - 0.001
    assert screened.passes <= 0.1 * exhaustive.passes
    known = ~screened.singles.isnan()
    torch.testing.assert_close(
        screened.singles[known], exhaustive.singles[known], rtol=0, atol=1e-6
    )


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
        pytest.param(lambda: unseen_scenes(0, 50), id="generated scenes"),
        pytest.param(lambda: unseen_scenes(50, 50), id="generated scenes, others"),
    ],
)
def test_finds_what_exhaustive_finds_in_a_tenth_of_the_passes(samples):
    """Minutes each: 252,300 passes."""
    shrunk = [sample.shrunk(128) for sample in samples()]
    small = [replace(sample, mask=sample.mask.copy()) for sample in shrunk]
    assert_found_in_a_tenth(vfmk.load_sam("tiny"), small)
