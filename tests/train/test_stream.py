"""The order of images and the chance in them depend on the seed and the position alone."""

import itertools

import pytest
import torch

from tests.train.train_shapes import build, images
from vfmk.train.stream import StreamSampler


def keys(first: int = 0, stop: int = 6, **options) -> list:
    return list(StreamSampler(7, 2, seed=3, first=first, stop=stop, **options))


def test_every_epoch_has_every_image_in_another_order():
    stream = list(itertools.chain(*keys(stop=7)))
    assert [epoch for epoch, _ in stream] == [0] * 7 + [1] * 7
    epochs = [[index for epoch, index in stream if epoch == e] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7))
    assert epochs[0] != epochs[1]


def test_stream_goes_on_from_any_position():
    for first in range(6):
        assert keys(first=first) == keys()[first:]


def test_processes_share_the_stream():
    shares = [keys(process=process, processes=2) for process in (0, 1)]
    together = [batch for pair in zip(*shares, strict=True) for batch in pair]
    assert together == keys()
    (twice,) = StreamSampler(7, 4, seed=3, first=0, stop=1)
    assert together[0] + together[1] == twice


def test_a_batch_larger_than_the_set_goes_round():
    (batch,) = StreamSampler(2, 5, seed=0, first=0, stop=1)
    assert [epoch for epoch, _ in batch] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("task", ["promptable", "semantic"])
def test_an_image_is_a_function_of_its_key(task):
    stream = images(build(task, "decoder"), 4)
    first = [stream[key] for key in ((0, 0), (0, 1), (1, 0))]
    state = torch.get_rng_state()
    for (image, target), key in zip(first[::-1], ((1, 0), (0, 1), (0, 0)), strict=True):
        again, other = stream[key]
        assert torch.equal(image, again)
        for name, value in target.items():
            same = (
                torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]
            )
            assert same, name
    assert torch.equal(torch.get_rng_state(), state)
    draws = [stream[(epoch, 0)][0] for epoch in range(8)]
    assert any(not torch.equal(image, draws[0]) for image in draws)
