import sys
from itertools import combinations

import numpy as np
import pytest

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from scipy import ndimage

from vfmk.data import demo_scenes as demo
from vfmk.data import scenes
from vfmk.data.sample import deepest_point


def test_scene_is_a_function_of_seed_and_index():
    first = [scenes.generate_scene(3, index) for index in range(4)]
    for index in reversed(range(4)):
        again = scenes.generate_scene(3, index)
        assert np.array_equal(again.image, first[index].image)
        assert np.array_equal(again.masks, first[index].masks)
    assert not np.array_equal(first[0].image, first[1].image)
    assert not np.array_equal(first[0].image, scenes.generate_scene(4, 0).image)


@pytest.mark.parametrize("size", [64, 128])
def test_scene_masks_are_what_is_visible(size):
    counts = set()
    for index in range(40):
        scene = scenes.generate_scene(0, index, size)
        assert scene.image.shape == (size, size, 3)
        assert scene.image.dtype == np.uint8
        assert scene.masks.shape[1:] == (size, size)
        assert scene.masks.dtype == bool
        assert scene.masks.mean((1, 2)).min() >= scenes.MIN_VISIBLE
        for a, b in combinations(scene.masks, 2):
            assert not (a & b).any()
        counts.add(len(scene.masks))
    assert len(counts) >= 4  # from one object to many
    assert max(counts) <= scenes.MAX_OBJECTS


@pytest.mark.parametrize("shape", scenes._SHAPES)
def test_every_shape_is_drawn_where_its_mask_says(shape, monkeypatch):
    """Flat paint only fades outwards, so a mask holds the brightest pixels and no others."""
    monkeypatch.setattr(scenes, "_SHAPES", (shape,))
    style = scenes._SCATTERED._replace(max_objects=1, shape_probabilities=(1.0,))
    monkeypatch.setattr(scenes, "_SCATTERED", style)
    monkeypatch.setattr(scenes, "_clutter", lambda rng, image: image)
    monkeypatch.setattr(scenes, "_camera", lambda rng, image, *rest: image)
    monkeypatch.setattr(scenes, "_frame", lambda rng, image: np.ones(image.shape[:2], bool))
    monkeypatch.setattr(scenes, "_colour", lambda rng: np.zeros(3, np.float32))
    monkeypatch.setattr(scenes, "_contrasting_colour", lambda rng, beneath: np.full(3, 255.0))
    monkeypatch.setattr(
        scenes,
        "_fill",
        lambda rng, size, colour, variety: np.full((size, size, 3), colour[0], np.float32),
    )
    for index in range(20):
        scene = scenes.generate_scene(7, index)
        (mask,) = scene.masks
        brightness = scene.image[..., 0]
        assert brightness[mask].min() >= brightness[~mask].max()
        assert brightness[mask].min() > 0.25 * 255


def test_close_up_is_one_object_larger_than_most():
    close_ups = [scenes.generate_scene(0, index, close_up=True) for index in range(40)]
    assert {len(scene.masks) for scene in close_ups} == {1}
    scattered = [scenes.generate_scene(0, index) for index in range(40)]
    areas = [[m.mean() for scene in kind for m in scene.masks] for kind in (close_ups, scattered)]
    assert np.median(areas[0]) > 3 * np.median(areas[1])


def test_demo_scene_is_a_function_of_its_arguments():
    sample, again = demo.demo_scene("train", 5), demo.demo_scene("train", 5)
    assert np.array_equal(sample.image, again.image)
    assert np.array_equal(sample.mask, again.mask)
    assert sample.id == again.id == "train-0-0005"
    for other in (("train", 6), ("held_out", 5), ("train", 5, 1)):
        assert not np.array_equal(sample.image, demo.demo_scene(*other).image)
        assert sample.id != demo.demo_scene(*other).id


def test_demo_splits_share_no_photograph_and_no_digit(monkeypatch):
    place = demo._place
    used = {"train": ([], set()), "held_out": ([], set())}
    split = "train"

    def spy_place(rng, scan, size):
        used[split][0].append(scan.tobytes())
        return place(rng, scan, size)

    photograph = demo._photograph

    def spy_photograph(name):
        used[split][1].add(name)
        return photograph(name)

    monkeypatch.setattr(demo, "_place", spy_place)
    monkeypatch.setattr(demo, "_photograph", spy_photograph)
    for split in used:
        demo.demo_scenes(split, 30, size=64)
    scans, photographs = zip(*used.values(), strict=True)
    assert not set(scans[0]) & set(scans[1])
    assert not photographs[0] & photographs[1]
    assert len(photographs[0]) == len(demo.PHOTOGRAPHS["train"])
    assert not set(scenes.TEXTURES) & (photographs[0] | photographs[1])


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_demo_mask_is_where_the_paint_is(split, monkeypatch):
    painted = demo.demo_scenes(split, 12)
    monkeypatch.setattr(demo, "_paint", lambda rng, background, ink: background.round())
    for sample, bare in zip(painted, demo.demo_scenes(split, 12), strict=True):
        assert np.array_equal(sample.mask, bare.mask)
        change = np.abs(sample.image - bare.image.astype(float)).mean(-1)
        outside = ~ndimage.binary_dilation(sample.mask, iterations=12)
        assert change[sample.mask].mean() > 3 * change[outside].mean()


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_demo_samples_are_well_formed(split):
    for sample in demo.demo_scenes(split, 12, seed=2, size=96):
        assert sample.image.shape == (96, 96, 3)
        assert sample.image.dtype == np.uint8
        assert sample.mask.shape == (96, 96)
        assert sample.mask.dtype == bool
        assert 0.005 < sample.mask.mean() < 0.4
        assert sample.points.shape == (1, 2)
        assert sample.labels.tolist() == [1]
        x, y = sample.points[0].astype(int)
        assert sample.mask[y, x]


def test_unknown_demo_split_is_refused():
    with pytest.raises(ValueError, match="train or held_out, got 'test'"):
        demo.demo_scene("test", 0)


@pytest.mark.parametrize("module", [scenes, demo])
def test_missing_photographs_name_the_extra(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    module._photograph.cache_clear()
    with pytest.raises(ImportError, match=r"pip install vfmk\[demo\]"):
        module._photograph("camera")


def test_deepest_point_keeps_away_from_edge_hole_and_border():
    mask = np.ones((9, 21), bool)
    mask[4, 14] = False
    x, y = deepest_point(mask)
    assert y == 4
    assert 4 <= x <= 9
