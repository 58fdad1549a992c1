"""What tells models, scores and samples apart."""

import functools
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.channels.conftest import build_sam
from vfmk.channels.digest import digest_of, digest_of_sam, digest_of_samples

TEMPERATURE = 2.0


@dataclass
class Labelled:
    image: torch.Tensor
    label: Any


@dataclass(slots=True)
class Slotted:
    image: torch.Tensor
    label: Any


class Named(NamedTuple):
    image: torch.Tensor
    label: Any


@pytest.mark.parametrize("kind", [Labelled, Slotted, Named, lambda *fields: list(fields)])
def test_all_that_a_sample_holds_tells_it_apart(kind):
    labels = [1, 1.0, "1", None, [1], [[1]], (1,), {"a": 1}, {"a": 2}, {"b": 1}, {1, 2}, {1, 3}]
    labels += [torch.ones(2), torch.ones(2, 1), np.ones(2), np.ones(2, np.float32), Path("1")]
    labels += [torch.device("cpu"), torch.float32, nn.Linear(2, 2), lambda: 1, lambda: 2]
    digests = [digest_of_samples([kind(torch.zeros(2), label)]) for label in labels]
    assert len(set(digests)) == len(labels)
    assert digests == [digest_of_samples([kind(torch.zeros(2), label)]) for label in labels]
    image = torch.zeros(2)
    assert digest_of_samples([kind(image, 1)] * 2) != digest_of_samples([kind(image, 1)])


@pytest.mark.parametrize("label", [object(), threading.Lock(), iter([1]), np.array([object()])])
def test_refuses_samples_that_cannot_be_told_apart(label):
    with pytest.raises(ValueError, match=rf"sample 1\.label is a {type(label).__qualname__}"):
        digest_of_samples([Labelled(torch.zeros(2), 1), Labelled(torch.zeros(2), label)])


def scaled(factor):
    return lambda features, sample: factor * features.mean(1)


def halved(features, sample, divisor=2):
    return features.mean(1) / divisor


def quartered(features, sample, divisor=4):
    return features.mean(1) / divisor


def through_a_helper(features, sample):
    return [halved(feature, sample) for feature in features]


def tempered(features, sample):
    def inner(feature):
        return feature / TEMPERATURE

    return inner(features)


class Score:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, features, sample):
        return self.factor * features.mean(1)

    def method(self, features, sample):
        return self.factor * features.amax(1)


def recursive(features, sample):
    return recursive(features[:1], sample) if len(features) > 1 else features


@torch.no_grad()
def without_gradient(features, sample):
    return functional.relu(features).mean(1)


SCORES = [
    *(scaled(1.0), scaled(2.0), scaled(torch.ones(1)), scaled(nn.Identity())),
    *(halved, quartered, through_a_helper, tempered, recursive, without_gradient),
    *(functools.partial(halved, divisor=3), functools.partial(halved, divisor=5)),
    *(Score(1.0), Score(2.0), Score(1.0).method, Score(2.0).method, functional.relu, torch.relu),
]


def test_all_that_a_function_computes_with_tells_it_apart():
    digests = [digest_of(score, "score_fn") for score in SCORES]
    assert len(set(digests)) == len(SCORES)
    assert digests == [digest_of(score, "score_fn") for score in SCORES]
    assert digest_of(scaled(2.0), "score_fn") == digests[1]
    assert digest_of(Score(2.0), "score_fn") == digest_of(Score(2.0), "score_fn")


def test_a_function_is_the_same_in_another_process():
    command = (
        "from tests.channels.test_digest import SCORES; from vfmk.channels.digest import digest_of;"
        "print(*(digest_of(score, 'score_fn') for score in SCORES))"
    )
    found = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert found.stdout.split() == [digest_of(score, "score_fn") for score in SCORES], found.stderr


@pytest.mark.parametrize(
    ("name", "value"), [("TEMPERATURE", 3.0), ("halved", quartered), ("TEMPERATURE", [2.0])]
)
def test_a_variable_that_a_function_reads_counts(monkeypatch, name, value):
    functions = [tempered, through_a_helper]
    before = [digest_of(function, "score_fn") for function in functions]
    monkeypatch.setitem(globals(), name, value)
    after = [digest_of(function, "score_fn") for function in functions]
    changed = [old != new for old, new in zip(before, after, strict=True)]
    assert changed == [name == "TEMPERATURE", name == "halved"]


def test_the_code_of_a_modules_class_counts(monkeypatch):
    class Head(nn.Linear):
        def forward(self, features):
            return super().forward(self.pooled(features))

        def pooled(self, features):
            return features.mean(1)

    torch.manual_seed(0)
    head = Head(4, 1)
    before, sam = digest_of(head, "score_fn"), build_sam()
    of_sam = digest_of_sam(sam)
    assert digest_of(head.eval(), "score_fn") == before
    assert digest_of(torch.compile(head), "score_fn") == digest_of(torch.compile(head), "score_fn")
    monkeypatch.setattr(Head, "pooled", lambda self, features: features.amax(1))
    assert digest_of(head, "score_fn") != before
    monkeypatch.setattr(type(sam), "forward", lambda self, images: images)
    assert digest_of_sam(sam) == of_sam  # libraries may change


def test_a_compiled_function_counts_as_it_is():
    assert digest_of(torch.compile(halved), "score_fn") == digest_of(halved, "score_fn")


def test_names_the_variable_that_cannot_be_told_apart():
    lock = threading.Lock()

    def guarded(features, sample):
        with lock:
            return features

    with pytest.raises(ValueError, match="the variable 'lock' of score_fn is a lock, of which"):
        digest_of(guarded, "score_fn")
