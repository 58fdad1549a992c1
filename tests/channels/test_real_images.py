"""The search on the bundled SAM and real images at their own size, against SamPredictor."""

import os
import random
from pathlib import Path

import pytest
import torch

import vfmk
from tests.channels.plain import plain_protocol, plain_scores
from vfmk.channels import load_samples, search
from vfmk.channels.records import Records
from vfmk.channels.scorers import SamScorer
from vfmk.channels.scoring import Scoring
from vfmk.data.demo_scenes import demo_scenes

DATA = Path(os.environ.get("VFMK_DATA", Path(__file__).parents[3] / "shared" / "data"))
CHANNELS = 64
TOLERANCE = 2e-5  # of an IoU: a pixel within rounding of the threshold may fall either way


def lesions(count):
    folder = DATA / "isic2016"
    if not folder.is_dir():
        pytest.skip(f"no photographs in {folder}; VFMK_DATA says where they are")
    return load_samples(folder, count)


def scenes(count):
    return demo_scenes("train", count, size=1024)


def sets_of_pairs(count):
    """Of 0 to 10 pairs, that overwrite and read the same channels as they come."""
    generator = random.Random(0)
    sets = [(), ((3, 8), (8, 3), (0, 8))]
    while len(sets) < count:
        overwritten = generator.sample(range(CHANNELS), generator.choice((1, 1, 2, 5, 10)))
        pairs = ((i, generator.randrange(CHANNELS)) for i in overwritten)
        sets.append(tuple((i, j) for i, j in pairs if i != j))
    return sets


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("images", [lesions, scenes])
def test_scores_equal_the_plain_loop(images, sequential, device, monkeypatch):
    """Image by image."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU is visible")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    sam, sets = vfmk.load_sam("tiny").to(device), sets_of_pairs(30)
    for sample in images(2):
        scoring = Scoring(SamScorer(sam), [sample], Records(None, {}, 1, sequential), False)
        actual = torch.tensor(scoring.score(sets, scoring.report("", 0)), dtype=torch.float64)
        expected = plain_scores(sam, [sample], sets, sequential)
        assert expected.std() > 1e-3
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("images", [lesions, scenes])
def test_the_whole_protocol_equals_the_plain_loop(images):
    """10,092 passes through SamPredictor: all 4,032 pairs and 1,023 subsets, on two images."""
    sam, samples = vfmk.load_sam("tiny"), images(2)
    plain = plain_protocol(sam, samples, CHANNELS, top_n=10)
    found = search(sam, samples, progress=False)
    torch.testing.assert_close(found.singles, plain.singles, rtol=0, atol=TOLERANCE)
    assert found.candidates == plain.candidates
    assert found.best.pairs == plain.best
    assert abs(found.best_score - plain.best_score) < TOLERANCE
