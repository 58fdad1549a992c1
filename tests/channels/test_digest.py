"""What tells samples apart."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from vfmk.channels.digest import digest_of_model, digest_of_samples


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


class Attributes(dict):
    """Which answers for any attribute, by None where it has none."""

    __getattr__ = dict.get


def attributes(image, label):
    return Attributes(image=image, label=label)


@pytest.mark.parametrize(
    "kind", [Labelled, Slotted, Named, attributes, lambda *fields: list(fields)]
)
def test_all_that_a_sample_holds_tells_it_apart(kind):
    labels = [1, 1.0, "1", None, [1], [[1]], (1,), {"a": 1}, {"a": 2}, {"b": 1}]
    labels += [torch.ones(2), torch.ones(2, 1), np.ones(2), np.ones(2, np.float32), Path("1")]
    digests = [digest_of_samples([kind(torch.zeros(2), label)]) for label in labels]
    assert len(set(digests)) == len(labels)
    assert digests == [digest_of_samples([kind(torch.zeros(2), label)]) for label in labels]
    image = torch.zeros(2)
    assert digest_of_samples([kind(image, 1)] * 2) != digest_of_samples([kind(image, 1)])


@pytest.mark.parametrize("label", [lambda: 1, torch.device("cpu"), nn.Identity(), object()])
def test_refuses_samples_that_cannot_be_told_apart(label):
    with pytest.raises(ValueError, match=rf"sample 1\.label is a {type(label).__name__}"):
        digest_of_samples([Labelled(torch.zeros(2), 1), Labelled(torch.zeros(2), label)])


def test_refuses_a_sample_that_holds_itself():
    sample = Labelled(torch.zeros(2), [])
    sample.label.append(sample)
    with pytest.raises(ValueError, match="sample 0 cannot be told apart: maximum recursion depth"):
        digest_of_samples([sample])


def test_what_a_model_holds_of_objects_does_not_count():
    model = nn.Identity()
    before = digest_of_model(model)
    model.names = np.array([object()])
    assert digest_of_model(model) == before
    model.names = np.array([1])
    assert digest_of_model(model) != before
