import json
from dataclasses import FrozenInstanceError, asdict

import pytest

import vfmk


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("rank", 2.0),
        ("rank", True),
        ("kernel_size", 4),
        ("kernel_size", -3),
        ("conv", "dense3d"),
        ("global_branch", 1),
        ("num_heads", 5),
        ("token_dim", "64"),
        ("low_dim", 0),
        ("num_queries", 0),
        ("scale", float("nan")),
        ("scale", "1"),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("sublayers", ()),
        ("sublayers", "attn"),
        ("sublayers", ("attn", "attn")),
        ("sublayers", ("attn", "norm")),
        ("layers_to_transform", ()),
        ("layers_to_transform", (-1,)),
        ("layers_to_transform", (0, 0)),
        ("layers_to_transform", 3),
        ("modules_to_save", "mask_decoder"),
        ("modules_to_save", (3,)),
    ],
)
def test_refuses_by_name(field, value):
    with pytest.raises(ValueError, match=f"VFMAdapterConfig: {field} must be"):
        vfmk.VFMAdapterConfig(**{field: value})


def test_is_frozen():
    with pytest.raises(FrozenInstanceError):
        vfmk.VFMAdapterConfig().rank = 8


def test_survives_json():
    config = vfmk.VFMAdapterConfig(layers_to_transform=(0, 2), modules_to_save=("mask_decoder",))
    assert vfmk.VFMAdapterConfig(**json.loads(json.dumps(asdict(config)))) == config
