import itertools
import json
import re
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vfmk
from tests.channels.conftest import CHANNELS, build_sam, build_samples
from tests.channels.plain import plain_protocol, plain_scores, subsets_of
from vfmk import channels
from vfmk.channels import ChannelMap, search
from vfmk.channels.dropping import shuffled
from vfmk.channels.records import Records
from vfmk.channels.scorers import chunk_size
from vfmk.data.sample import Sample

PAIRS = CHANNELS * (CHANNELS - 1)


def test_refuses_pairs_of_other_channels(sam, samples, tmp_path):
    output = tmp_path / "scores.jsonl"
    output.write_text(
        '{"pairs": [], "miou": 1, "samples": 3}\n'
        f'{{"pairs": [[1, {CHANNELS}]], "miou": 1, "samples": 3}}\n'
    )
    with pytest.raises(ValueError, match=r"scores\.jsonl: .* pair 1:16 is outside the 16 channels"):
        search(sam, samples, top_n=1, output=output, progress=False)


@dataclass
class Labelled:
    image: torch.Tensor
    label: Any


@pytest.fixture(scope="module")
def result(sam, samples):
    return search(sam, samples, top_n=4, progress=False)


def test_exhaustive_equals_the_plain_loop(sam, samples, result):
    plain = plain_protocol(sam, samples, CHANNELS, top_n=4)
    torch.testing.assert_close(result.singles, plain.singles, rtol=0, atol=2e-5)
    assert abs(result.baseline - plain.singles[0, 0]) < 2e-5
    assert result.candidates == plain.candidates
    assert result.best.pairs == plain.best
    assert abs(result.best_score - plain.best_score) < 2e-5
    assert result.passes == len(samples) * (1 + PAIRS + 2**4 - 1 - 4)


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
    torch.testing.assert_close(found.singles, result.singles, rtol=0, atol=1e-6)
    assert found.best_score <= result.best_score + 1e-6
    missed = [pair for pair in result.candidates if pair not in found.candidates]
    assert missed
    assert found.audit == missed
    # The gradients, and the frozen model again, image by image.
    assert found.passes == result.passes + 4 * len(samples)


def test_the_audit_takes_one_pair_for_each_channel_and_misses_none(monkeypatch):
    """Of four channels, each worth another value; (2, 1) is passed over, for one pass."""
    values, samples = torch.tensor([0.0, 8.0, 2.0, 4.0]), [Labelled(torch.ones(1), 0)]
    options = {"score_fn": lambda f, s: f @ torch.tensor([1.0, 0.1, 1.0, 0.01]), "top_n": 2}
    options |= {"strategy": "screened", "keep": 1 / 12, "progress": False}
    few = search(lambda image: values[None], samples, **options)
    assert few.singles.isnan().sum() == 11
    assert few.audit is None
    (kept,) = few.candidates
    audited = search(lambda image: values[None], samples, audit=12, **options)
    assert audited.candidates == [kept]
    assert kept == (0, 1)
    assert audited.audit == [(2, 1)]
    assert not audited.singles.isnan().any()
    none = search(lambda image: values[None], samples, audit=1, **options)
    assert none.singles.isnan().sum() == 10


def test_of_subsets_that_score_alike_the_first_is_taken():
    """Lexicographically, whatever the candidates' order."""

    def score(features, sample):
        first, third, fifth = (features[:, [1, 3, 5]] > 0).T
        alike = fifth & (first ^ third)
        return torch.where(alike, 1.0, 0.1 * first + 0.3 * third + 0.2 * fifth)

    values = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    found = search(
        lambda image: image, [Labelled(values, 0)], score_fn=score, top_n=3, progress=False
    )
    assert found.candidates == [(3, 0), (5, 0), (1, 0)]
    assert sorted(found.best.pairs) == [(1, 0), (5, 0)]


def test_a_score_that_is_not_finite_in_another_process_stops_this_one(sam, samples, monkeypatch):
    monkeypatch.setattr("vfmk.channels.scoring.summed", lambda sums: sums.mul_(torch.nan))
    with pytest.raises(ValueError, match="a score is not finite"):
        search(sam, samples, progress=False)


def test_refuses_a_model_with_a_channel_map(samples):
    mapped = channels.apply(build_sam(), ChannelMap(((1, 2),), CHANNELS))
    encoder = torch.nn.Sequential(mapped.image_encoder)
    for model, score_fn in ((mapped, None), (encoder, lambda features, sample: features.mean(1))):
        with pytest.raises(ValueError, match="the model has a channel map; remove it first"):
            search(model, samples, score_fn=score_fn, progress=False)
    search(channels.remove(mapped), samples[:1], top_n=1, progress=False)


def test_takes_a_peft_model(samples):
    import peft

    def with_lora():
        torch.manual_seed(1)
        config = peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)
        return peft.get_peft_model(build_sam(), config)

    merged = with_lora().merge_and_unload()
    found = search(with_lora(), samples, top_n=1, progress=False)
    expected = search(merged, samples, top_n=1, progress=False)
    torch.testing.assert_close(found.singles, expected.singles, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "mode", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode]
)
def test_the_callers_modes_change_nothing(sam, samples, result, mode):
    options = {"top_n": 4, "strategy": "screened", "keep": 1.0, "progress": False}
    with mode():
        found = search(sam, samples, **options)
    torch.testing.assert_close(found.singles, result.singles, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pairs", [1, 3])
def test_screened_with_passes_for_fewer_pairs_than_are_wanted(sam, samples, pairs):
    options = {"strategy": "screened", "keep": pairs / PAIRS, "progress": False}
    found = search(sam, samples, top_n=8, **options)
    assert 1 <= len(found.candidates) <= pairs
    assert found.best_score >= max(found.singles[pair] for pair in found.candidates)


def test_screened_refuses_a_model_without_gradients(samples):
    with torch.inference_mode():
        sam = build_sam()
    with pytest.raises(ValueError, match="the model was made under inference_mode"):
        search(sam, samples, strategy="screened", progress=False)


RACE = {"top_n": 4, "strategy": "screened", "keep": 0.2, "progress": False}


@pytest.fixture(scope="module")
def many():
    return build_samples(12)


@pytest.fixture(scope="module")
def raced(sam, many, tmp_path_factory):
    """Of a search that races, the result and the lines it wrote."""
    output = tmp_path_factory.mktemp("raced") / "scores.jsonl"
    result = search(sam, many, output=output, **RACE)
    return result, [json.loads(line) for line in output.read_text().splitlines()]


def assert_same(result, expected):
    torch.testing.assert_close(result.singles, expected.singles, rtol=0, atol=0, equal_nan=True)
    assert (result.candidates, result.best) == (expected.candidates, expected.best)
    assert result.best_score == expected.best_score


def test_screened_races_and_what_it_does_not_drop_is_exact(sam, many, raced):
    found, lines = raced
    dropped = [line["samples"] for line in lines if line["samples"] < len(many)]
    assert sum(line["samples"] for line in lines) == found.passes - 4 * len(many)
    pairs = [line for line in lines if len(line["pairs"]) == 1]
    spent = sum(line["samples"] for line in pairs) / len(many)
    assert spent <= 0.2 * PAIRS < len(pairs) - 10
    assert min(dropped) >= 5
    exhaustive = search(sam, many, top_n=4, progress=False)
    scored = ~found.singles.isnan()
    whole = [line for line in pairs if line["samples"] == len(many)]
    assert scored.sum() == CHANNELS + len(whole) < len(pairs)
    assert torch.equal(found.singles[scored], exhaustive.singles[scored])
    assert (found.candidates, found.best) == (exhaustive.candidates, exhaustive.best)
    for line in pairs:
        (pair,) = line["pairs"]
        truth = float(exhaustive.singles[tuple(pair)])
        error = abs(found.baseline + line["delta"] - truth)
        assert error <= 4 * line["spread"] * (line["samples"] < len(many)) + 1e-12
        if line["samples"] == len(many):
            assert line["miou"] == truth
    first = min(pairs, key=lambda line: line["samples"])
    seen = [many[number] for number in shuffled(len(many))[: first["samples"]]]
    on_seen = search(sam, seen, progress=False).singles
    for line in pairs:
        if line["samples"] == len(seen):
            ((i, j),) = line["pairs"]
            assert line["miou"] == pytest.approx(float(on_seen[i, j]), abs=1e-9)


def test_a_race_goes_on_and_recomputes_nothing(sam, many, raced, tmp_path):
    """From every part of what was written."""
    found, lines = raced
    output = tmp_path / "scores.jsonl"
    for count in (10, 30, 60, len(lines)):
        output.write_text("".join(f"{json.dumps(line)}\n" for line in lines[:count]))
        again = search(sam, many, output=output, **RACE)
        assert again.known == count
        assert_same(again, found)
        left = sum(line["samples"] for line in lines[count:])
        assert again.passes == left + (4 if left else 3) * len(many)
        written = [json.loads(line) for line in output.read_text().splitlines()]
        assert sorted(map(str, written)) == sorted(map(str, lines))


def test_what_was_dropped_is_scored_where_it_is_asked_for(sam, many, raced, tmp_path):
    found, lines = raced
    output = tmp_path / "scores.jsonl"
    output.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    audited = search(sam, many, output=output, audit=PAIRS, **RACE)
    assert audited.passes == 3 * len(many) + found.singles.isnan().sum() * len(many)
    exhaustive = search(sam, many, top_n=4, progress=False)
    whole = search(sam, many, top_n=4, output=output, progress=False)
    assert whole.passes < 15 * len(many)  # subsets that the screened search dropped
    assert torch.equal(whole.singles, exhaustive.singles)
    assert (whole.best, whole.best_score) == (exhaustive.best, exhaustive.best_score)
    again = search(sam, many, output=output, **RACE)
    assert again.passes == 3 * len(many)
    assert_same(again, found)


class Killed(BaseException):
    pass


def test_pairs_applied_at_once_have_no_order(sam, samples, tmp_path):
    """A file that has them in another one is gone on with; under `sequential` they are others."""
    output = tmp_path / "scores.jsonl"
    found = search(sam, samples, top_n=3, output=output, progress=False)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    for line in lines:
        line["pairs"].reverse()
    output.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    again = search(sam, samples, top_n=3, output=output, progress=False)
    assert again.passes == 0
    assert_same(again, found)
    for sequential, same in ((False, True), (True, False)):
        records = Records(None, {}, 3, sequential)
        assert (records.key(((5, 2), (3, 7))) == records.key(((3, 7), (5, 2)))) == same


def interrupted(monkeypatch, after):
    add, calls = Records.add, itertools.count()

    def adding(self, scores):
        add(self, scores)
        if next(calls) == after:
            raise Killed

    monkeypatch.setattr(Records, "add", adding)


def test_resumes_and_recomputes_nothing(sam, samples, result, tmp_path, monkeypatch):
    monkeypatch.setattr("vfmk.channels.scorers.CPU_BYTES", 8 * 8 * CHANNELS * 64 * 4)
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
    assert again.known == done
    third = search(sam, samples, top_n=4, output=output, progress=False)
    assert (third.passes, third.known) == (0, len(lines))


@pytest.mark.parametrize("tail", [None, b'{"miou": 0.5, "pa', b"\0\0\0"])
def test_a_cut_last_line_is_dropped_and_told(sam, samples, result, tmp_path, tail):
    output = tmp_path / "scores.jsonl"
    search(sam, samples, top_n=4, output=output, progress=False)
    content = output.read_bytes()
    *whole, last = content.splitlines(keepends=True)
    output.write_bytes(b"".join(whole) + (tail or last[:-7]))
    with pytest.warns(UserWarning, match="ended in a cut line"):
        again = search(sam, samples, top_n=4, output=output, progress=False)
    assert again.passes == len(samples)
    assert again.best == result.best
    assert sorted(output.read_bytes().splitlines()) == sorted(content.splitlines())


def test_goes_on_with_a_whole_last_line_that_has_no_end(sam, samples, tmp_path):
    output = tmp_path / "scores.jsonl"
    search(sam, samples, top_n=4, output=output, progress=False)
    content = output.read_bytes()
    lines = content.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:20]).rstrip(b"\n"))
    again = search(sam, samples, top_n=4, output=output, progress=False)
    assert again.known == 20
    assert sorted(output.read_bytes().splitlines()) == sorted(content.splitlines())


def test_refuses_the_file_of_another_run(sam, samples, tmp_path):
    output = tmp_path / "scores.jsonl"
    search(sam, samples, top_n=1, output=output, progress=False)
    before = output.read_bytes()
    with pytest.raises(ValueError, match=r"scores\.jsonl, line 1: .* of different samples"):
        search(sam, build_samples(2), top_n=1, output=output, progress=False)
    with pytest.raises(ValueError, match="of different model"):
        search(build_sam(1), samples, top_n=1, output=output, progress=False)
    with pytest.raises(ValueError, match="of different sequential"):
        search(sam, samples, top_n=1, sequential=True, output=output, progress=False)
    assert output.read_bytes() == before


def test_adapters_in_force_make_another_model(samples, tmp_path):
    output = tmp_path / "scores.jsonl"
    config = vfmk.VFMAdapterConfig(rank=4, dropout=0.5)
    adapted = vfmk.get_adapted_model(build_sam(), config).train()
    search(adapted.sam, samples, top_n=1, output=output, progress=False)
    assert adapted.training
    with adapted.disable_adapter(), pytest.raises(ValueError, match="of different model"):
        search(adapted.sam, samples, top_n=1, output=output, progress=False)
    again = search(adapted.sam, samples, top_n=1, output=output, progress=False)
    assert again.passes == 0


def test_refuses_the_file_of_another_encoder_score_or_label(sam, samples, tmp_path):
    """A function is told by what it gives: some of the file's scores are looked at again."""
    output = tmp_path / "scores.jsonl"
    channels, image = 12, torch.arange(12.0)
    torch.manual_seed(0)
    heads = torch.randn(2, channels)

    def by(head):
        return lambda features, sample: features @ head

    def run(factor=1.0, head=heads[0], label=(1, [2])):
        options = {"top_n": 3, "output": output, "progress": False}
        samples = [Labelled(image, label), Labelled(image.square(), label)]
        return search(lambda image: factor * image, samples, score_fn=by(head), **options)

    first = run()
    text = output.read_text()
    again = run()
    assert again.passes == 2 * 17  # the frozen model and 16 more on two samples
    assert again.known == len(text.splitlines())
    assert_same(again, first)
    slightly = heads[0] * (torch.arange(channels) != 5)
    for change, message in (
        ({"factor": 1.01}, "is of another model or other samples, or another score: .* there"),
        ({"head": heads[1]}, "is of another model or other samples, or another score: .* there"),
        ({"head": slightly}, "is of another model or other samples, or another score: .* there"),
        ({"label": (1, [3])}, "of different samples"),
    ):
        with pytest.raises(ValueError, match=rf"scores\.jsonl.* {message}"):
            run(**change)
    with pytest.raises(ValueError, match="of different score and samples and model"):
        search(sam, samples, output=output, progress=False)
    assert output.read_text() == text


@pytest.mark.parametrize("known", [1, 2, 5, 40])
def test_looks_again_at_scores_of_all_ranks(known):
    scoring = sys.modules["vfmk.channels.scoring"]
    ranked = [((0, number),) for number in range(1, known + 1)]
    for place in (0, 1, known):  # of the frozen model
        probed = scoring._spread([*ranked[:place], (), *ranked[place:]])
        assert probed[0] == ()
        assert {ranked[0], ranked[-1]} <= set(probed)
        assert len(probed) == len(set(probed)) == min(known + 1, 17)
    assert scoring._spread([()]) == [()]


def test_a_score_far_from_the_others_excuses_none_of_them():
    """The worst of −MSE may be a million times the frozen model's."""
    records = Records(None, {}, 1)
    records.scores = {(): -3e-4, ((0, 1),): -2e-4, ((1, 0),): -800.0}
    records.check_scores({(): -3.001e-4, ((0, 1),): -2e-4, ((1, 0),): -800.1})
    with pytest.raises(ValueError, match=r"the frozen model scores -0\.0003 there"):
        records.check_scores({(): -4.5e-4, ((0, 1),): -2e-4, ((1, 0),): -800.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": np.ones((40, 40), np.uint8)}, "must have a bool mask, has uint8"),
        ({"points": np.ones((0, 2), np.float32)}, "has no points"),
        ({"labels": np.ones(2, np.int64)}, "has 1 points, 2 labels"),
        ({"mask": np.zeros((40, 40), bool)}, "has an empty mask"),
        ({"mask": np.ones((41, 40), bool)}, "image and mask differ in size"),
        ({"points": np.array([[40.0, 3.0]], np.float32)}, "a point outside its image"),
        ({"labels": np.full(1, 7)}, r"has a label that is neither 0 nor 1: \[7\]"),
        ({"mask": np.ones((40, 40, 1), bool)}, r"must have a bool mask, has bool \[40, 40, 1\]"),
        ({"image": np.zeros((40, 40), np.uint8)}, r"uint8 image \[H, W, 3\], has uint8 \[40, 40\]"),
        ({"image": np.zeros((40, 40, 3))}, r"uint8 image \[H, W, 3\], has float64 \[40, 40, 3\]"),
    ],
)
def test_bad_samples(sam, change, message, tmp_path):
    good = Sample(
        "lesion",
        np.zeros((40, 40, 3), np.uint8),
        np.ones((40, 40), bool),
        np.ones((1, 2), np.float32),
        np.ones(1, np.int64),
    )
    with pytest.raises(ValueError, match=f"sample 'lesion'.*{message}"):
        search(sam, [replace(good, **change)], output=tmp_path / "s.jsonl", progress=False)
    assert not list(tmp_path.iterdir())


def test_refuses_a_file_that_another_run_writes(sam, samples, tmp_path):
    output = tmp_path / "scores.jsonl"
    holder = Records(output, {}, 3)
    with pytest.raises(ValueError, match="is being written by another run"):
        search(sam, samples, top_n=1, output=output, progress=False)
    holder.close()


def test_refuses_what_is_no_record(sam, samples, tmp_path):
    output = tmp_path / "scores.jsonl"
    frozen = '{"pairs": [], "miou": 1, "samples": 3}\n'
    texts = (
        '{"pairs": [[1]]}\n',
        "notes\n",
        "notes",
        '{"pairs": [[1, 2]], "miou": 1, "samples": 3}\n',
        '{"pairs": [], "miou": 1, "samples": 2}\n',  # of another number of samples
        '{"pairs": [], "miou": NaN, "samples": 3}\n',
        frozen + frozen,
        '{"pairs": [], "miou": 1, "samples": 3, "run": "mine"}\n',
        *(
            frozen
            + "".join(f'{{"pairs": {pairs}, "miou": {score}, "samples": 3}}\n' for score in scores)
            for pairs, scores in (
                ("[[1.5, 2]]", [1]),
                ("[[3, 3]]", [1]),
                ("[[1, 2], [1, 3]]", [1]),
                ("[[1, 2]]", [1, 2]),  # which?
            )
        ),
        "notes\n{",
        frozen + '{"pairs": [[1, 2]], "miou": 1, "samples": 2}\n',
        *(
            frozen + f'{{"pairs": [[1, 2]], "miou": 1, {fields}}}\n'
            for fields in (
                '"samples": 2, "spread": 0.1',
                '"samples": 2, "spread": null, "delta": 0',
                '"samples": 2, "spread": NaN, "delta": 0',
                '"samples": 4, "spread": 0.1, "delta": 0',
                '"samples": 0, "spread": 0.1, "delta": 0',
            )
        ),
        '{"pairs": [], "miou": 1, "samples": 2, "spread": 0.1, "delta": 0}\n',
    )
    for text in texts:
        output.write_text(text)
        with pytest.raises(ValueError, match=r"scores\.jsonl"):
            search(sam, samples, top_n=1, output=output, progress=False)
        assert output.read_text() == text


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
    for score_fn in (lambda f, s: f.sum(), lambda f, s: [0.5] * len(f)):
        with pytest.raises(ValueError, match=r"a float for each of \d+ candidates"):
            search(encoder, samples, score_fn=score_fn, progress=False)
    with pytest.raises(TypeError, match=r"model must give features \[1, .* gave a Tensor \[2, "):
        search(lambda x: x.repeat(2, 1, 1, 1), samples, score_fn=log_likelihood, progress=False)
    with pytest.raises(ValueError, match="a gradient of the score is not finite"):
        search(
            encoder,
            samples,
            score_fn=lambda f, s: (f.mean((1, 2)) * 0).sqrt(),
            strategy="screened",
            progress=False,
        )
    head = nn.Linear(1, 1)
    for score_fn in (
        lambda f, s: (f.mean((1, 2)) > 0).float(),
        lambda f, s: head(f.detach()[:, :1, 0])[:, 0],  # of the head, not of the features
    ):
        with pytest.raises(ValueError, match="needs a score_fn with a gradient"):
            search(encoder, samples, score_fn=score_fn, strategy="screened", progress=False)


def test_a_score_function_that_is_a_module_is_in_eval_mode():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, features, sample):
            return self.dropout(features).mean((1, 2))

    head, samples = Head(), [Labelled(torch.randn(3, 8, 8), 0)]
    first, second = (
        search(Tokens(), samples, score_fn=head, top_n=1, progress=False) for _ in range(2)
    )
    assert torch.equal(first.singles, second.singles)
    assert head.training
    assert head.dropout.training


class DinoTokens(nn.Module):
    """[1, 3, H, W] → [1, N, C] of a DINOv2, its class token first."""

    def __init__(self):
        super().__init__()
        from transformers import Dinov2Config, Dinov2Model

        torch.manual_seed(0)
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.backbone = Dinov2Model(Dinov2Config(image_size=28, patch_size=7, **sizes))

    def forward(self, image):
        return self.backbone(image).last_hidden_state


def labelled_images(count):
    images = torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return [Labelled(image, k % 3) for k, image in enumerate(images)]


def remapped_by_hand(encoder, samples, pair):
    """Features [1, N, C] with one channel overwritten, image by image."""
    for sample in samples:
        with torch.no_grad():
            features = encoder(sample.image[None])
        i, j = pair
        features[..., i] = features[..., j].clone()
        yield features


def test_accuracy_of_a_classifier_on_dinov2():
    """The second frozen encoder: a linear head on the class token."""
    encoder, head = DinoTokens().eval(), nn.Linear(24, 3)
    samples = labelled_images(7)
    with torch.no_grad():  # between the classes, so that it tells some of them apart
        tokens = torch.cat([encoder(sample.image[None])[:, 0] for sample in samples])
        head.bias.copy_(-head.weight @ tokens.mean(0))

    def accuracy(features, sample):
        return (head(features[:, 0]).argmax(-1) == sample.label).float()

    found = search(encoder, samples, score_fn=accuracy, top_n=3, progress=False)
    for pair in (*found.candidates, (5, 9)):
        right = [
            head(features[0, 0]).argmax() == sample.label
            for features, sample in zip(
                remapped_by_hand(encoder, samples, pair), samples, strict=True
            )
        ]
        assert found.singles[pair] == pytest.approx(sum(right).item() / len(samples))
    assert found.best_score > found.baseline


@pytest.mark.parametrize("strategy", ["exhaustive", "screened"])
def test_depth_on_dinov2(strategy):
    """A linear head on every patch; the score is −MSE."""
    encoder, head = DinoTokens().eval(), nn.Linear(24, 1)
    samples = labelled_images(4)
    depths = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    for number, sample in enumerate(samples):
        sample.label = number

    def negative_mse(features, sample):
        return -(head(features[:, 1:])[..., 0] - depths[sample.label]).square().mean(1)

    options = {"score_fn": negative_mse, "top_n": 3, "progress": False}
    found = search(encoder, samples, strategy=strategy, **options)
    pair = found.candidates[0]
    expected = [
        negative_mse(features, sample).item()
        for features, sample in zip(remapped_by_hand(encoder, samples, pair), samples, strict=True)
    ]
    assert found.singles[pair] == pytest.approx(sum(expected) / 4, abs=1e-6)
    assert found.best_score > found.baseline


def test_refuses_what_is_no_features():
    def encoder(image):
        return {"features": image}

    with pytest.raises(TypeError, match=r"model must give features \[1, C, h, w\].* gave a dict"):
        search(encoder, labelled_images(1), score_fn=lambda f, s: f.sum(), progress=False)


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
        ({"top_n": 2.5}, TypeError, "top_n must be an int"),
        ({"keep": "0.1"}, TypeError, "keep must be a number"),
        ({"audit": 3}, ValueError, "keep and audit go with"),
        ({"keep": 0.1}, ValueError, "keep and audit go with"),
        ({"top_n": 0}, ValueError, "top_n must be from 1 to 16"),
        ({"keep": 0.0}, ValueError, "keep must be in"),
        ({"audit": -1}, ValueError, "audit must be at least 0"),
        ({"model": nn.Identity()}, TypeError, "model must be a Sam or an AdaptedSam"),
        ({"model": build_sam().half()}, TypeError, "must be in float32, .* is in torch.float16"),
        ({"score_fn": len, "samples": [Labelled(torch.ones(3), 0)]}, TypeError, "of a Sam take"),
        ({"score_fn": len, "model": "vit"}, TypeError, "model must be an encoder, got a str"),
    ],
)
def test_bad_arguments(sam, samples, options, error, message):
    arguments = {"model": sam, "samples": samples, "progress": False, **options}
    with pytest.raises(error, match=message):
        search(arguments.pop("model"), arguments.pop("samples"), **arguments)


@pytest.mark.filterwarnings("ignore:search. .* ended in a cut line")
def test_the_authors_scores_are_gone_on_with(sam, samples, result, tmp_path):
    """Their lines do not say of which run they are."""
    output = tmp_path / "results.jsonl"
    score = float(result.singles[2, 3])
    lines = [
        {"pairs": [], "miou": result.baseline, "delta": 0.0, "samples": 3},
        {"pairs": [[2, 3]], "miou": score, "delta": score - result.baseline, "samples": 3},
    ]
    output.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    again = search(sam, samples, top_n=4, output=output, progress=False)
    assert again.passes == result.passes  # the two are scored anew
    assert (again.candidates, again.best) == (result.candidates, result.best)
    assert [json.loads(line) for line in output.read_text().splitlines()[:2]] == lines

    text = output.read_text()
    with pytest.raises(ValueError, match=r"results\.jsonl is of another model or other samples"):
        search(build_sam(1), samples, top_n=4, output=output, progress=False)
    assert output.read_text() == text
    for tail in ('{"pairs": [[2,', json.dumps(lines[1])):  # nor is its last line mended
        output.write_text(text + tail)
        with pytest.raises(ValueError, match="is of another model or other samples"):
            search(build_sam(1), samples, top_n=4, output=output, progress=False)
        assert output.read_text() == text + tail


def test_hashes_nothing_without_an_output(sam, samples, monkeypatch):
    module = sys.modules["vfmk.channels.search"]  # the function of its name hides it
    monkeypatch.delattr(module, "digest_of_model")
    search(sam, samples, top_n=1, progress=False)


def test_dropout_in_a_decoders_lora_is_off(samples, result):
    """The decoder's projections are read in eval mode."""
    import peft

    def with_lora(training):
        sam = build_sam()
        torch.manual_seed(1)
        config = peft.LoraConfig(
            target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False
        )
        peft.inject_adapter_in_model(config, sam.mask_decoder)
        return sam.train(training)

    first, second = (
        search(with_lora(training), samples, top_n=1, progress=False) for training in (True, False)
    )
    assert torch.equal(first.singles, second.singles)
    assert not torch.equal(first.singles, result.singles)


def test_progress_says_how_fast_how_long_and_what_is_best(sam, samples, capfd):
    found = search(sam, samples, top_n=2)
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in lines] == [" encoding", " pairs", " subsets"]
    assert "3 of 3 images" in lines[0]
    best = sorted(
        (float(score), -i, -j)
        for i, row in enumerate(found.singles)
        for j, score in enumerate(row)
        if i != j
    )[:-4:-1]
    named = ", ".join(rf"{score:.4f} \({-i}:{-j}\)" for score, i, j in best)
    assert re.fullmatch(
        rf"search: pairs: {3 * PAIRS} of {3 * PAIRS} passes, [\d,.]+ passes/s, 0:00:00 left,"
        rf" best {named}",
        lines[1],
    )


def test_a_chunk_fits_into_the_memory_that_is_free(monkeypatch):
    gib = 1 << 30
    features = SimpleNamespace(is_cuda=True, device="cuda", nbytes=4 << 20)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: gib // 2)
    for free, candidates in ((100 * gib, 256), (gib // 2, 16), (-gib // 2 + 1, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 141 * gib))
        assert chunk_size(features, copies=8) == candidates
