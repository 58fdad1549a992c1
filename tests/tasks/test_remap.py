import numpy as np
import pytest

from tests.channels.conftest import CHANNELS, build_sam, build_samples
from vfmk import channels
from vfmk.channels import ChannelMap
from vfmk.tasks import remap
from vfmk.tasks.controls import controlled_score, mean_iou, predict_logits

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
    score = remap._evaluate(sam, MAP, train, test, tmp_path)
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


def test_interval_of_equal_gains_is_a_point():
    low, high = remap._bootstrap_interval(np.full(5, 0.25))
    assert (low, high) == (0.25, 0.25)
