import json

import numpy as np
import pytest
from PIL import Image

from vfmk.data import DataError
from vfmk.data.folder import load_samples
from vfmk.data.sample import Sample

HEIGHT, WIDTH = 20, 30


@pytest.fixture
def triple(tmp_path):
    """A folder of one image, one mask (a rectangle) and one point."""
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.jpg")
    write_mask(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("6,5\n")
    return tmp_path


def write_mask(path, height=HEIGHT, width=WIDTH, value=255):
    mask = np.zeros((height, width), np.uint8)
    mask[2:11, 4:21] = value
    Image.fromarray(mask).save(path)


def test_triple(triple):
    (sample,) = load_samples(triple)
    assert sample.id == "a"
    assert sample.image.shape == (HEIGHT, WIDTH, 3)
    assert sample.image.dtype == np.uint8
    assert np.array_equal(sample.image, np.asarray(Image.open(triple / "a.jpg")))
    assert sample.mask.dtype == bool
    assert sample.mask.sum() == 9 * 17
    assert sample.points.tolist() == [[6, 5]]
    assert sample.points.dtype == np.float32
    assert sample.labels.tolist() == [1]


def test_without_a_point_file_the_point_is_the_deepest(triple):
    (triple / "a.txt").unlink()
    (sample,) = load_samples(triple)
    x, y = sample.points[0]
    assert y == 6
    assert 8 <= x <= 16


def test_box_and_point_gives_the_point(triple):
    (triple / "a.txt").write_text("4,2,20,10,7.5,3.25")
    assert load_samples(triple)[0].points.tolist() == [[7.5, 3.25]]


@pytest.mark.parametrize("value", [1, 180, 255])
def test_mask_is_what_is_brighter_than_half_its_maximum(triple, value):
    write_mask(triple / "a.png", value=value)
    assert load_samples(triple)[0].mask.sum() == 9 * 17


def test_each_mask_is_read_for_itself(triple):
    """Two tools' binary masks, and one of a class with its border left open."""
    for stem, value in (("b", 1), ("c", 2), ("d", 180)):
        Image.open(triple / "a.jpg").save(triple / f"{stem}.jpg")
        write_mask(triple / f"{stem}.png", value=value)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[2:12, 4:21], mask[2:11, 4:21] = 255, 5
    Image.fromarray(mask).save(triple / "d.png")
    samples = load_samples(triple)
    assert [sample.mask.sum() for sample in samples] == [9 * 17] * 4
    assert [sample.mask.sum() for sample in load_samples(triple, limit=1)] == [9 * 17]


@pytest.mark.parametrize("mode", ["1", "RGB", "P"])
def test_mask_in_other_modes(triple, mode):
    Image.open(triple / "a.png").convert(mode).save(triple / "a.png")
    assert load_samples(triple)[0].mask.sum() == 9 * 17


def test_samples_come_in_the_order_of_their_stems(triple):
    for stem in ("b10", "b9"):
        Image.open(triple / "a.jpg").save(triple / f"{stem}.jpeg")
        write_mask(triple / f"{stem}.png")
    assert [sample.id for sample in load_samples(triple)] == ["a", "b10", "b9"]
    as_split = load_samples(triple.parent, split=triple.name)
    assert [sample.id for sample in as_split] == ["a", "b10", "b9"]


def test_images_and_masks_in_their_own_folders(triple):
    (triple / "images").mkdir()
    (triple / "masks").mkdir()
    Image.open(triple / "a.jpg").save(triple / "images" / "b.png")
    (triple / "a.jpg").rename(triple / "images" / "a.jpg")
    (triple / "a.txt").rename(triple / "images" / "a.txt")
    write_mask(triple / "masks" / "a.png")
    write_mask(triple / "masks" / "b.png")
    a, b = load_samples(triple)
    assert (a.id, b.id) == ("a", "b")
    assert a.points.tolist() == [[6, 5]]
    assert np.array_equal(a.image, b.image)


def test_missing_folder_and_folder_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_samples(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="train does not exist"):
        load_samples(tmp_path, split="train")
    with pytest.raises(DataError, match=r"has no image \(\.jpeg, \.jpg\)"):
        load_samples(tmp_path)


def missing_mask(folder):
    (folder / "a.png").unlink()


def mask_of_another_size(folder):
    write_mask(folder / "a.png", height=HEIGHT + 1)


def unreadable_image(folder):
    (folder / "a.jpg").write_bytes(b"not an image")


def cut_image(folder):
    content = (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(content[: len(content) // 2])


def unreadable_mask(folder):
    (folder / "a.png").write_bytes(b"")


def empty_mask(folder):
    write_mask(folder / "a.png", value=0)


def point_outside_image(folder):
    (folder / "a.txt").write_text(f"{WIDTH},5")


def point_left_of_image(folder):
    (folder / "a.txt").write_text("-0.5,5")


def point_off_mask(folder):
    (folder / "a.txt").write_text("3,5")


def three_numbers(folder):
    (folder / "a.txt").write_text("1,2,3")


def words(folder):
    (folder / "a.txt").write_text("here,there")


def bytes_for_a_point(folder):
    (folder / "a.txt").write_bytes(b"\xff\xfe")


def point_is_nan(folder):
    (folder / "a.txt").write_text("nan,5")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing_mask, r"a\.jpg has no mask .*a\.png"),
        (mask_of_another_size, r"a\.png is 30x21 pixels, its image 30x20"),
        (unreadable_image, r"a\.jpg is unreadable"),
        (cut_image, r"a\.jpg is unreadable"),
        (unreadable_mask, r"a\.png is unreadable"),
        (empty_mask, r"a\.png is empty"),
        (point_outside_image, r"a\.txt: \(30\.0, 5\.0\) is outside the 30x20 image"),
        (point_left_of_image, r"a\.txt: \(-0\.5, 5\.0\) is outside the 30x20 image"),
        (point_off_mask, r"a\.txt: \(3\.0, 5\.0\) is outside the mask"),
        (three_numbers, r"a\.txt must hold .* got '1,2,3'"),
        (words, r"a\.txt must hold .* got 'here,there'"),
        (bytes_for_a_point, r"a\.txt is unreadable"),
        (point_is_nan, r"a\.txt: \(nan, 5\.0\) is outside"),
    ],
)
def test_what_does_not_fit_is_named(triple, spoil, message):
    spoil(triple)
    with pytest.raises(ValueError, match=message):
        load_samples(triple)


def test_a_large_sample_is_shrunk_with_its_points():
    mask = np.zeros((300, 600), bool)
    mask[100:200, 300:500] = True
    sample = Sample.with_deepest_point("large", np.zeros((300, 600, 3), np.uint8), mask)
    small = sample.shrunk(60)
    assert small.image.shape == (30, 60, 3)
    assert small.mask.mean() == mask.mean()
    x, y = small.points[0].astype(int)
    assert small.mask[y, x]
    assert sample.shrunk(600) is sample


def test_a_manifest_gives_its_points_and_all_its_splits(triple):
    lines = [
        {"id": "x/1", "split": "a", "points": [[6, 5], [0, 0]], "labels": [1, 0]},
        {"split": "b"},
    ]
    manifest = triple / "manifest.jsonl"
    manifest.write_text(
        "".join(json.dumps({"image": "a.jpg", "mask": "a.png", **line}) + "\n" for line in lines)
    )
    first, second = load_samples(manifest)
    assert (first.id, second.id) == ("x/1", "a")
    assert first.points.tolist() == [[6, 5], [0, 0]]
    assert first.labels.tolist() == [1, 0]
    assert second.labels.tolist() == [1]
    assert len(load_samples(manifest, limit=1)) == 1
    assert [sample.id for sample in load_samples(manifest, split="b")] == ["a"]
    manifest.write_text(manifest.read_text()[:-9])
    with pytest.raises(DataError, match=r"manifest\.jsonl:2 is not JSON"):
        load_samples(manifest)
    manifest.write_text("\n")
    with pytest.raises(DataError, match=r"manifest\.jsonl lists no image"):
        load_samples(manifest)
