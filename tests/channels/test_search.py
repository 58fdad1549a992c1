import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from torch import nn

import vfmk
from tests.channels.conftest import CHANNELS, build_sam, build_samples
from vfmk.channels import ChannelMap, search
from vfmk.channels.records import Records
from vfmk.data.sample import Sample
from vfmk.tasks.controls import binary_iou

PAIRS = CHANNELS * (CHANNELS - 1)


def plain_scores(sam, samples, sets, sequential=False):
    """Each set of pairs by itself, through SamPredictor."""
    predictor, totals = SamPredictor(sam), torch.zeros(len(sets), dtype=torch.float64)
    for sample in samples:
        predictor.set_image(sample.image)
        features = predictor.features.clone()
        for k, pairs in enumerate(sets):
            predictor.features = features.clone()
            for i, j in pairs:
                source = predictor.features if sequential else features
                predictor.features[:, i] = source[:, j]
            masks, _, _ = predictor.predict(sample.points, sample.labels, multimask_output=False)
            totals[k] += binary_iou(masks[0], sample.mask)
    return totals / len(samples)


def subsets_of(candidates):
    sizes = range(1, len(candidates) + 1)
    return [s for size in sizes for s in itertools.combinations(candidates, size)]


@pytest.fixture(scope="module")
def result(sam, samples):
    return search(sam, samples, top_n=4, progress=False)


def test_exhaustive_equals_the_plain_loop(sam, samples, result):
    pairs = list(itertools.permutations(range(CHANNELS), 2))
    scores = plain_scores(sam, samples, [(), *((pair,) for pair in pairs)])
    assert abs(result.baseline - scores[0]) < 2e-5
    expected = torch.diag(torch.full((CHANNELS,), result.baseline, dtype=torch.float64))
    expected[tuple(zip(*pairs, strict=True))] = scores[1:]
    torch.testing.assert_close(result.singles, expected, rtol=0, atol=2e-5)
    best = sorted(zip(-scores[1:], pairs, strict=True))
    by_channel = {}
    for _, (i, j) in best:
        by_channel.setdefault(i, (i, j))
    assert result.candidates == list(by_channel.values())[:4]
    subsets = subsets_of(result.candidates)
    scores = plain_scores(sam, samples, subsets)
    assert abs(result.best_score - scores.max()) < 2e-5
    assert result.best.pairs == subsets[scores.argmax()]
    assert result.passes == len(samples) * (1 + PAIRS + len(subsets) - 4)


def test_sequential_equals_pairs_in_order(sam, samples, result):
    # The candidates are those of single pairs, which have no order.
    found = search(sam, samples, top_n=6, sequential=True, progress=False)
    subsets = subsets_of(found.candidates)
    scores = plain_scores(sam, samples, subsets, sequential=True)
    assert abs(found.best_score - scores.max()) < 2e-5
    best = subsets[scores.argmax()]
    assert found.best == ChannelMap.in_order(best, CHANNELS)


def test_positive_only():
    values = torch.tensor([1.0, 0.0, 4.0, 2.0])
    samples = [Labelled(values, 0)]

    def first_channel(features, sample):
        return features[:, 0]

    def encoder(image):
        return image

    options = {"score_fn": first_channel, "top_n": 3, "progress": False}
    assert len(search(encoder, samples, **options).candidates) == 3
    found = search(encoder, samples, positive_only=True, **options)
    assert found.candidates == [(0, 2)]
    assert (found.baseline, found.best_score) == (1, 4)
    values = torch.tensor([4.0, 0.0])
    found = search(encoder, [Labelled(values, 0)], positive_only=True, **options)
    assert (found.candidates, found.best.pairs, found.best_score) == ([], (), 4)


def test_screened_scores_are_exact_and_audited(sam, samples, result):
    found = search(
        sam, samples, top_n=4, strategy="screened", keep=4 / PAIRS, audit=PAIRS, progress=False
    )
    scored = ~found.singles.isnan()
    assert scored.sum() == CHANNELS + 4
    torch.testing.assert_close(found.singles[scored], result.singles[scored], rtol=0, atol=1e-6)
    assert found.best_score <= result.best_score + 1e-6
    bar = min(found.singles[pair] for pair in found.candidates)
    missed = (~scored & (result.singles > bar)).nonzero().tolist()
    assert missed
    assert sorted(found.audit) == [tuple(pair) for pair in missed]


class Killed(BaseException):
    pass


def interrupted(monkeypatch, after):
    add, calls = Records.add, itertools.count()

    def adding(self, scores):
        add(self, scores)
        if next(calls) == after:
            raise Killed

    monkeypatch.setattr(Records, "add", adding)


def test_resumes_and_recomputes_nothing(sam, samples, result, tmp_path, monkeypatch):
    monkeypatch.setattr("vfmk.channels.scorers.CPU_BYTES", 8 * CHANNELS * 64 * 4)
    output = tmp_path / "scores.jsonl"
    with monkeypatch.context() as patch:
        interrupted(patch, after=3)
        with pytest.raises(Killed):
            search(sam, samples, top_n=4, output=output, progress=False)
    done = output.read_text().count("\n")
    assert 1 < done < PAIRS
    again = search(sam, samples, top_n=4, output=output, progress=False)
    assert again.passes == result.passes - done * len(samples)
    assert again.best == result.best
    torch.testing.assert_close(again.singles, result.singles, rtol=0, atol=1e-12)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines[0]["pairs"] == []
    assert len({json.dumps(line["pairs"]) for line in lines}) == len(lines)
    third = search(sam, samples, top_n=4, output=output, progress=False)
    assert third.passes == 0


def test_a_cut_last_line_is_dropped_and_told(sam, samples, result, tmp_path):
    output = tmp_path / "scores.jsonl"
    search(sam, samples, top_n=4, output=output, progress=False)
    content = output.read_bytes()
    output.write_bytes(content[:-7])
    with pytest.warns(UserWarning, match="ended in a cut line"):
        again = search(sam, samples, top_n=4, output=output, progress=False)
    assert again.passes == len(samples)
    assert again.best == result.best
    assert sorted(output.read_bytes().splitlines()) == sorted(content.splitlines())


def test_refuses_the_file_of_another_run(sam, samples, tmp_path):
    output = tmp_path / "scores.jsonl"
    search(sam, samples, top_n=1, output=output, progress=False)
    before = output.read_bytes()
    with pytest.raises(ValueError, match=r"scores\.jsonl, line 1: .* another samples"):
        search(sam, build_samples(2), top_n=1, output=output, progress=False)
    with pytest.raises(ValueError, match="another model"):
        search(build_sam(1), samples, top_n=1, output=output, progress=False)
    with pytest.raises(ValueError, match="another sequential"):
        search(sam, samples, top_n=1, sequential=True, output=output, progress=False)
    assert output.read_bytes() == before


def test_adapters_in_force_make_another_model(samples, tmp_path):
    output = tmp_path / "scores.jsonl"
    config = vfmk.VFMAdapterConfig(rank=4, dropout=0.5)
    adapted = vfmk.get_adapted_model(build_sam(), config).train()
    search(adapted.sam, samples, top_n=1, output=output, progress=False)
    assert adapted.training
    with adapted.disable_adapter(), pytest.raises(ValueError, match="another model"):
        search(adapted.sam, samples, top_n=1, output=output, progress=False)
    again = search(adapted.sam, samples, top_n=1, output=output, progress=False)
    assert again.passes == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": np.zeros((40, 40), bool)}, "has an empty mask"),
        ({"mask": np.ones((41, 40), bool)}, "image and mask differ in size"),
        ({"points": np.array([[40.0, 3.0]], np.float32)}, "a point outside its image"),
    ],
)
def test_bad_samples(sam, change, message):
    good = Sample(
        "lesion",
        np.zeros((40, 40, 3), np.uint8),
        np.ones((40, 40), bool),
        np.ones((1, 2), np.float32),
        np.ones(1, np.int64),
    )
    with pytest.raises(ValueError, match=f"sample 'lesion'.*{message}"):
        search(sam, [replace(good, **change)], progress=False)


def test_refuses_a_file_that_another_run_writes(sam, samples, tmp_path):
    output = tmp_path / "scores.jsonl"
    holder = Records(output, {}, 3)
    with pytest.raises(ValueError, match="is being written by another run"):
        search(sam, samples, top_n=1, output=output, progress=False)
    holder.close()


def test_refuses_what_is_no_record(sam, samples, tmp_path):
    output = tmp_path / "scores.jsonl"
    texts = (
        '{"pairs": [[1]]}\n',
        "notes\n",
        "notes",
        '{"pairs": [[1, 2]], "miou": 1, "samples": 3}\n',
        '{"pairs": [], "miou": 1, "samples": 2}\n',  # of another number of samples
    )
    for text in texts:
        output.write_text(text)
        with pytest.raises(ValueError, match=r"scores\.jsonl"):
            search(sam, samples, top_n=1, output=output, progress=False)
        assert output.read_text() == text


@dataclass
class Labelled:
    image: torch.Tensor
    label: int


class Tokens(nn.Module):
    """[1, 3, 8, 8] → [1, N, C], as a vision transformer gives them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 12, 4, stride=4)

    def forward(self, image):
        return self.patches(image).flatten(2).transpose(1, 2)


def test_any_encoder_and_score():
    encoder, head = Tokens(), nn.Linear(12, 3)
    generator = torch.Generator().manual_seed(0)
    samples = [Labelled(torch.randn(3, 8, 8, generator=generator), k % 3) for k in range(5)]

    def log_likelihood(features, sample):
        return head(features.mean(1)).log_softmax(-1)[:, sample.label]

    found = search(encoder, samples, score_fn=log_likelihood, top_n=3, progress=False)
    for pairs in ((), ((2, 7),)):
        index = ChannelMap(pairs, 12).index
        expected = sum(
            log_likelihood(encoder(s.image[None])[..., index], s).item() for s in samples
        )
        actual = found.singles[pairs[0]] if pairs else found.baseline
        assert abs(actual - expected / 5) < 1e-6
    screened = search(
        encoder, samples, score_fn=log_likelihood, top_n=3, strategy="screened", progress=False
    )
    assert screened.best_score > screened.baseline
    with pytest.raises(ValueError, match=r"a float for each of \d+ candidates"):
        search(encoder, samples, score_fn=lambda f, s: f.sum(), progress=False)
    with pytest.raises(ValueError, match="needs a score_fn with a gradient"):
        search(
            encoder,
            samples,
            score_fn=lambda f, s: (f.mean((1, 2)) > 0).float(),
            strategy="screened",
            progress=False,
        )


def test_depth_from_feature_maps():
    """The score is −MSE of a linear read-out at every pixel."""
    encoder, head = nn.Conv2d(3, 10, 2, stride=2), nn.Conv2d(10, 1, 1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 8, 8, generator=generator)
    samples = [Labelled(image, k) for k, image in enumerate(images)]
    depths = torch.randn(4, 4, 4, generator=generator)

    def negative_mse(features, sample):
        return -(head(features)[:, 0] - depths[sample.label]).square().mean((1, 2))

    found = search(encoder, samples, score_fn=negative_mse, top_n=3, progress=False)
    index = ChannelMap(((4, 1),), 10).index
    with torch.no_grad():
        features = encoder(images)[:, index]
        expected = -(head(features)[:, 0] - depths).square().mean()
    assert abs(found.singles[4, 1] - expected) < 1e-6
    assert found.best_score > found.baseline


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"samples": []}, ValueError, "no samples"),
        ({"strategy": "random"}, ValueError, "strategy must be one of exhaustive, screened"),
        ({"top_n": 0}, ValueError, "top_n must be from 1 to 16"),
        ({"keep": 0.0}, ValueError, "keep must be in"),
        ({"audit": -1}, ValueError, "audit must be at least 0"),
        ({"model": nn.Identity()}, TypeError, "model must be a Sam or an AdaptedSam"),
    ],
)
def test_bad_arguments(sam, samples, options, error, message):
    arguments = {"model": sam, "samples": samples, "progress": False, **options}
    with pytest.raises(error, match=message):
        search(arguments.pop("model"), arguments.pop("samples"), **arguments)


SCRIPT = """
import sys
import torch.distributed as dist
from tests.channels.conftest import build_sam, build_samples
from vfmk.channels import search
dist.init_process_group("gloo")
result = search(build_sam(), build_samples(3), top_n=4, output=sys.argv[1], progress=False)
print(result.best.pairs, f"{result.best_score:.9f}", result.passes)
"""


def test_two_processes_share_the_candidates(result, tmp_path):
    output, script = tmp_path / "scores.jsonl", tmp_path / "run.py"
    script.write_text(SCRIPT)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *launcher, script, output],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
    )
    expected = f"{result.best.pairs} {result.best_score:.9f} {result.passes}\n"
    assert done.stdout == 2 * expected, done.stderr
    assert len(output.read_text().splitlines()) == 1 + PAIRS + 15 - 4
