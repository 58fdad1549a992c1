import json

import numpy as np
import pytest
from PIL import Image

from tests.channels.conftest import CHANNELS, build_sam, build_samples
from vfmk import channels
from vfmk.channels import ChannelMap
from vfmk.tasks import remap
from vfmk.tasks.controls import (
    THRESHOLDS,
    controlled_score,
    mean_iou,
    predict_logits,
    tuned_controls,
)

MAP = ChannelMap(((3, 8), (8, 3), (0, 8)), CHANNELS)


@pytest.fixture
def counted():
    """A SAM, and a list that grows with each image encoded."""
    sam, encoded = build_sam(), []
    sam.image_encoder.register_forward_hook(lambda *_: encoded.append(1))
    return sam, encoded


def test_scores_are_the_models_without_and_with_the_map(tmp_path, counted):
    sam, encoded = counted
    train, test = build_samples(3), build_samples(4, seed=1)
    score = remap._evaluate(sam, MAP, tuned_controls(sam, train), test, tmp_path)
    assert len(encoded) == len(train) + len(test)
    expected = controlled_score(sam, train, test)
    assert score.frozen == pytest.approx(expected.model)
    assert score.frozen_tuned_threshold == pytest.approx(expected.model_tuned_threshold)
    assert score.disc == pytest.approx(expected.disc)
    assert (score.threshold, score.radius) == (expected.threshold, expected.radius)
    channels.apply(sam, MAP)
    remapped = [predict_logits(sam, sample) > 0 for sample in test]
    assert score.remapped == pytest.approx(mean_iou(remapped, test))
    assert score.remapped != score.frozen
    low, high = score.gain_interval
    assert low <= score.remapped - score.frozen <= high


def test_the_test_split_is_looked_at_once(tmp_path, counted):
    sam, encoded = counted
    train, test = build_samples(3), build_samples(2, seed=1)
    remap.run_search(sam, train, test, tmp_path, facts={}, top_n=2, progress=False)
    # to search, to tune the controls, to test
    assert len(encoded) == 2 * len(train) + len(test)
    report = (tmp_path / "report.md").read_text()
    for text in (
        "on the search samples",
        "on the samples that it was chosen on",
        "on 2 test samples",
        "its threshold tuned on the search samples",
        "95 % of bootstrap samples",
        "gains.png",
        "heat_map.png",
        "grid.png",
    ):
        assert text in report


def test_without_test_samples_the_search_samples_are_shown(tmp_path, counted):
    sam, encoded = counted
    train = build_samples(3)
    remap.run_search(sam, train, [], tmp_path, facts={}, top_n=2, progress=False)
    assert len(encoded) == 3 * len(train)  # to search, to tune the controls, to show
    report = (tmp_path / "report.md").read_text()
    assert "how the controls do there, is\nnot known" in report
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["test"] is None
    logits = [predict_logits(sam, sample) for sample in train]
    tuned = max(mean_iou([z > t for z in logits], train) for t in THRESHOLDS)
    assert metrics["baseline_tuned_threshold"] == pytest.approx(tuned)
    assert f"| {tuned:.4f} |" in report
    height = 2.1 * len(train) * 110  # a row of pictures each
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (880, pytest.approx(height, abs=1))


def test_interval_of_equal_gains_is_a_point():
    low, high = remap._bootstrap_interval(np.full(5, 0.25))
    assert (low, high) == (0.25, 0.25)


def test_interval_of_many_gains_is_that_of_a_normal_mean():
    """Within a tenth: 2,000 draws."""
    gains = np.random.default_rng(1).normal(0.03, 0.2, 400)
    low, high = remap._bootstrap_interval(gains)
    error = 1.96 * gains.std() / 400**0.5
    assert (low + high) / 2 == pytest.approx(gains.mean(), abs=0.1 * error)
    assert high - low == pytest.approx(2 * error, rel=0.1)
    assert remap._bootstrap_interval(gains) == (low, high)
