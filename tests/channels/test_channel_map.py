import json

import pytest
import torch

from vfmk.channels import ChannelMap


def test_index_reads_from_the_original():
    assert ChannelMap(((0, 2), (2, 1)), 4).index.tolist() == [2, 1, 1, 3]


def test_in_order_reads_what_was_written():
    pairs = ((2, 1), (0, 2), (1, 2))
    values = [10, 11, 12, 13]
    for i, j in pairs:
        values[i] = values[j]
    in_order = ChannelMap.in_order(pairs, 4)
    assert torch.tensor([10, 11, 12, 13])[in_order.index].tolist() == values


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        (((0, 4),), ValueError, "pair 0:4 is outside the 4 channels"),
        (((-1, 2),), ValueError, "pair -1:2 is outside"),
        (((2, 2),), ValueError, "overwrites a channel by itself"),
        (((1, 2), (1, 3)), ValueError, "1:2 and 1:3 clash"),
        (((1, 2, 3),), TypeError, "a pair is two channels"),
        (((1, 2.0),), TypeError, "a pair is two channels"),
    ],
)
def test_bad_pairs(pairs, error, message):
    with pytest.raises(error, match=message):
        ChannelMap(pairs, 4)


def test_save_and_load(tmp_path):
    path = tmp_path / "map.json"
    saved = ChannelMap(((0, 2), (2, 1)), 4)
    saved.save(path, dataset="skin", miou=0.5)
    assert ChannelMap.load(path) == saved
    assert json.loads(path.read_text())["miou"] == 0.5


def test_reads_the_authors_files(tmp_path):
    path = tmp_path / "map.json"
    path.write_text(
        '{"dataset": "isic", "backend": "sam_b", "pairs": [[3, 250]], "miou": 0.5, "delta": 0.1,'
        ' "samples": 50}'
    )
    assert ChannelMap.load(path) == ChannelMap(((3, 250),), 256)


@pytest.mark.parametrize(
    "document",
    [
        b'{"pairs": [[1, 2]',
        b'{"miou": 1}',
        b"[]",
        b'{"pairs": [[1, 1]]}',
        b'{"pairs": [[1, 2]], "num_channels": 64.0}',
        b"\x89PNG",
    ],
)
def test_refuses_what_is_no_map(tmp_path, document):
    path = tmp_path / "map.json"
    path.write_bytes(document)
    with pytest.raises(ValueError, match=r"map\.json is no channel map"):
        ChannelMap.load(path)
