from types import SimpleNamespace

import numpy as np
import pytest

from vfmk.data.sample import Sample
from vfmk.tasks import controls


def square(id="a", side=11):
    mask = np.zeros((21, 41), bool)
    mask[10 - side // 2 : 11 + side // 2, 20 - side // 2 : 21 + side // 2] = True
    return Sample.with_deepest_point(id, np.zeros((21, 41, 3), np.uint8), mask)


def test_iou():
    a = np.array([True, True, False, False])
    b = np.array([True, False, True, False])
    assert controls.binary_iou(a, b) == pytest.approx(1 / 3)
    assert controls.binary_iou(a, a) == 1
    assert controls.binary_iou(~(a | ~a), ~(a | ~a)) == 0


def test_disc_is_round_the_point_in_shares_of_the_longer_side():
    mask = controls.disc(square(), 5 / 41)
    y, x = np.nonzero(mask)
    assert (x.min(), x.max(), y.min(), y.max()) == (15, 25, 5, 15)
    assert mask.sum() == 81  # lattice points within 5 of one


def test_controls_are_tuned_on_train_and_scored_on_test(monkeypatch):
    """A model whose logits are the mask's, shifted: only the right threshold finds it."""
    shifted = lambda sam, sample: np.where(sample.mask, 5.0, 3.0)  # noqa: E731
    monkeypatch.setattr(controls, "predict_logits", shifted)
    train, test = [square("a"), square("b")], [square("c", side=5)]
    score = controls.controlled_score(SimpleNamespace(mask_threshold=0.0), train, test)
    assert score.model == pytest.approx(25 / (21 * 41))
    assert score.model_tuned_threshold == 1
    assert 3 <= score.threshold < 5
    assert score.disc == controls.binary_iou(controls.disc(test[0], score.radius), test[0].mask)
    on_train = [
        controls.mean_iou([controls.disc(s, r) for s in train], train) for r in controls.RADII
    ]
    assert score.radius == controls.RADII[np.argmax(on_train)]
