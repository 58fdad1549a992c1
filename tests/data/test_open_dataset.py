import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vfmk.data import DataError, collate, dataset, digest, open_dataset, transforms

HEIGHT, WIDTH = 20, 30
ISIC = Path(os.environ.get("VFMK_DATA", Path(__file__).parents[3] / "shared" / "data")) / "isic2016"


def save(path, pixels, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = Image.fromarray(pixels)
    if palette:
        file = file.convert("P")
        file.putpalette(palette)
        file.putdata(pixels.ravel().tolist())
    file.save(path)


def photograph(seed=0, height=HEIGHT):
    return np.random.default_rng(seed).integers(0, 256, (height, WIDTH, 3), np.uint8)


def mask_of(*values):
    """A stripe of 3 columns for each value."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for i, value in enumerate(values):
        mask[:, 3 * i : 3 * i + 3] = value
    return mask


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of images and masks, one for each mask given."""

    def make(*masks, where="", palette=None):
        for name, mask in zip("abc", masks, strict=False):
            save(tmp_path / where / "images" / f"{name}.jpg", photograph())
            save(tmp_path / where / "masks" / f"{name}.png", mask, palette)
        return tmp_path

    return make


COLOURS = [value for i in range(256) for value in (i * 37 % 256, i * 91 % 256, i)]


@pytest.mark.parametrize("value", [1, 180, 255])
def test_binary_masks(folder, value):
    root = folder(mask_of(0, value), mask_of(0))
    data = open_dataset(root, "semantic")
    assert data.classes == ["background", "object"]
    semantic = data[0][1]["semantic"]
    assert semantic.dtype == torch.uint8
    assert np.array_equal(semantic, mask_of(0, 1))
    assert not data[1][1]["semantic"].any()
    with pytest.raises(DataError, match=r"b\.png is empty, expected an object"):
        open_dataset(root, "promptable")


def test_grey_class_masks(folder):
    root = folder(mask_of(0, 1, 255), mask_of(2, 0, 4), mask_of(0, 255))
    data = open_dataset(root, "semantic")
    assert data.classes == ["background", "class 1", "class 2", "class 3", "class 4"]
    assert np.array_equal(data[0][1]["semantic"], mask_of(0, 1, 255))
    assert np.array_equal(data[2][1]["semantic"], mask_of(0, 255))
    named = open_dataset(root, "semantic", classes=["background", *"abcd"])
    assert named.classes == ["background", "a", "b", "c", "d"]
    few = open_dataset(root, "semantic", classes=["background", "a", "b"])
    with pytest.raises(DataError, match=r"b\.png holds class 4, there are 3"):
        few[1]
    assert len(open_dataset(root, "semantic", classes=few.classes, skip_bad=True)) == 2


def test_palette_masks_are_indices(folder):
    root = folder(mask_of(0, 5, 255), palette=COLOURS)
    data = open_dataset(root, "semantic")
    assert len(data.classes) == 6
    assert np.array_equal(data[0][1]["semantic"], mask_of(0, 5, 255))
    masks = open_dataset(root, "promptable")[0][1]["masks"]
    assert np.array_equal(masks, mask_of(0, 1)[None])


def test_palette_of_two_greys_is_read_as_it_looks(folder):
    root = folder(mask_of(0, 1), palette=[255, 255, 255, 0, 0, 0])
    masks = open_dataset(root, "promptable")[0][1]["masks"]
    assert np.array_equal(masks, mask_of(0, 1)[None] == 0)


def test_soft_edges_are_binary(folder):
    root = folder(mask_of(0, 40, 120, 200, 255))
    assert np.array_equal(open_dataset(root, "semantic")[0][1]["semantic"], mask_of(0, 0, 0, 1, 1))


@pytest.mark.parametrize("task", ["semantic", "promptable"])
def test_binary_masks_each_have_a_maximum_of_their_own(folder, task):
    """As where two tools wrote them, one 0 and 1, one 0 and 255, one with soft edges."""
    masks = mask_of(0, 1), mask_of(0, 255)
    for third in ([], [mask_of(0, 200, 90, 255)]):
        data = open_dataset(folder(*masks, *third), task)
        assert data.classes == (["background", "object"] if task == "semantic" else ["object"])
        shown = [data[i][1]["semantic" if task == "semantic" else "masks"] for i in range(2)]
        for mask in shown:
            assert np.array_equal(mask.reshape(HEIGHT, WIDTH), mask_of(0, 1))


def test_palette_of_black_and_one_colour_is_binary(folder):
    data = open_dataset(folder(mask_of(0, 255), mask_of(0), palette=COLOURS), "semantic")
    assert data.classes == ["background", "object"]
    assert np.array_equal(data[0][1]["semantic"], mask_of(0, 1))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([mask_of(0, 255), mask_of(1, 2)], r"a\.png holds 0, 255, as .*b\.png holds 0, 1, 2, as"),
        (
            [mask_of(2), mask_of(255)],
            r"b\.png holds 0, 255, as .*, but .*a\.png holds 0, 2, as ind",
        ),
        (
            [mask_of(1, 2), mask_of(*range(120, 130))],
            r"b\.png holds 0, 120, 121, 122, 123, 124, 125 to 129, as a binary.*a\.png",
        ),
    ],
)
def test_masks_of_two_kinds_are_refused(folder, masks, message):
    root = folder(*masks)
    for task in ("semantic", "promptable"):
        with pytest.raises(DataError, match=message):
            open_dataset(root, task)
    classes = [str(i) for i in range(120)]
    assert len(open_dataset(root, "semantic", classes=classes)) == 2


def test_palette_with_a_binary_mask_is_refused(folder):
    root = folder(mask_of(1, 2), palette=COLOURS)
    save(root / "images" / "b.jpg", photograph())
    for value, rest in ((255, "0, 255"), (200, "0, 200")):
        save(root / "masks" / "b.png", mask_of(0, value))
        with pytest.raises(
            DataError, match=rf"b\.png holds {rest}, as a binary .*a\.png holds 0, 1"
        ):
            open_dataset(root, "semantic")


def test_255_beside_an_index_is_ignored_elsewhere_too(folder):
    root = folder(mask_of(1, 255), mask_of(0, 255))
    data = open_dataset(root, "semantic")
    assert data.classes == ["background", "class 1"]
    assert np.array_equal(data[1][1]["semantic"], mask_of(0, 255))
    with pytest.raises(DataError, match=r"b\.png is empty"):
        open_dataset(root, "promptable")[1]


def test_images_of_background_alone_keep_their_classes(folder):
    classes = ["background", "a", "b"]
    data = open_dataset(folder(mask_of(0)), "semantic", classes=classes)
    assert data.classes == classes
    assert not data[0][1]["semantic"].any()


def test_every_index_is_an_object(folder):
    data = open_dataset(folder(mask_of(3, 0, 1, 255)), "promptable")
    assert data.classes == ["object"]
    image, target = data[0]
    assert image.dtype == torch.uint8
    assert image.shape == (3, HEIGHT, WIDTH)
    assert target["masks"].dtype == torch.bool
    assert np.array_equal(target["masks"], [mask_of(0, 0, 1), mask_of(1)])
    assert "points" not in target


def test_point_belongs_to_the_object_beneath_it(folder):
    root = folder(mask_of(3, 0, 1))
    (root / "images" / "a.txt").write_text("7.5,4")
    points = open_dataset(root, "promptable")[0][1]["points"]
    assert points.dtype == torch.float32
    assert points[0].tolist() == [7.5, 4]
    assert points[1].isnan().all()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["background", "a", "b"], "the masks are binary, 2 classes, got"),
        (["background"], "different names, at least 2"),
        (["a", "a"], "different names, at least 2"),
        ([str(i) for i in range(256)], "of semantic at most 255"),
    ],
)
def test_classes_that_do_not_fit(folder, classes, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(folder(mask_of(0, 255)), "semantic", classes=classes)


def test_arguments(folder, tmp_path):
    root = folder(mask_of(0, 255))
    with pytest.raises(ValueError, match=r"task must be one of promptable, .* got 'panoptic'"):
        open_dataset(root, "panoptic")
    with pytest.raises(ValueError, match="promptable objects have no classes"):
        open_dataset(root, "promptable", classes=["background", "a"])
    with pytest.raises(ValueError, match=r"classes\[0\] must be 'background', got 'a'"):
        open_dataset(root, "instance", classes=["a", "background"])
    with pytest.raises(DataError, match="detection: mask files name no instances"):
        open_dataset(root, "detection")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_dataset(tmp_path / "nowhere", "semantic")
    with pytest.raises(DataError, match=r"a\.jpg is neither a folder nor \.json"):
        open_dataset(root / "images" / "a.jpg", "semantic")


def test_unrecognised_folder(tmp_path):
    for looked_for in ("JPEGImages", "annotations/", "images/ with masks/", "manifest", "train/"):
        with pytest.raises(DataError, match=f"not a data set that is known.*{looked_for}"):
            open_dataset(tmp_path, "semantic")


def test_split_folders(folder):
    root = folder(mask_of(0, 255), where="train")
    folder(mask_of(255), mask_of(0, 0, 255), where="val")
    assert len(open_dataset(root, "semantic", split="train")) == 1
    assert len(open_dataset(root, "semantic", split="val")) == 2
    for split in (None, "test"):
        with pytest.raises(DataError, match=rf"splits \['train', 'val'\], asked for {split!r}"):
            open_dataset(root, "semantic", split=split)


def coloured_mask(root):
    save(root / "masks" / "a.png", photograph())


def wide_mask(root):
    Image.fromarray(np.full((HEIGHT, WIDTH), 60_000, np.uint16)).save(root / "masks" / "a.png")


def deep_image(root):
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)).save(root / "images" / "a.png")
    (root / "images" / "a.jpg").unlink()


def two_images(root):
    save(root / "images" / "a.png", photograph())


def lonely_mask(root):
    save(root / "masks" / "d.png", mask_of(255))


def lonely_image(root):
    (root / "masks" / "a.png").unlink()


def turned_mask(root):
    save(root / "masks" / "a.png", mask_of(255).T.copy())


def cut_mask(root):
    path = root / "masks" / "a.png"
    path.write_bytes(path.read_bytes()[:60])


def short_header(root):
    """For which Pillow has a ValueError of its own."""
    path = root / "masks" / "a.png"
    content = bytearray(path.read_bytes())
    content[11] = 5  # of 13 bytes
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message", "left"),
    [
        (coloured_mask, r"a\.png is a coloured picture, expected a grey or palette mask", 1),
        (wide_mask, r"a\.png holds 60000 to 60000, expected 0 to 255", 1),
        (deep_image, r"a\.png has I;16 pixels, expected 8 bits a channel", 1),
        (two_images, r"a\.png has the stem of .*a\.jpg", 2),
        (lonely_mask, r"d\.png has no image .*images/d", 2),
        (lonely_image, r"a\.jpg has no mask .*masks/a\.png", 1),
        (turned_mask, r"a\.png is 20x30 pixels, its image 30x20 \(.*a\.jpg\)", 1),
        (cut_mask, r"a\.png is unreadable", 1),
        (short_header, r"a\.png is unreadable: Truncated IHDR chunk", 1),
    ],
)
def test_what_does_not_fit_is_named_or_left_out(folder, spoil, message, left):
    root = folder(mask_of(0, 255), mask_of(255))
    spoil(root)
    with pytest.raises(DataError, match=message):
        open_dataset(root, "semantic")[0]
    data = open_dataset(root, "semantic", skip_bad=True)
    assert len(data) == left
    (reason,) = data.skipped
    with pytest.raises(DataError, match=message):
        raise DataError(reason)


def test_nothing_left(folder):
    root = folder(mask_of(0, 255))
    cut_mask(root)
    with pytest.raises(
        DataError, match=r"no usable record, the first of 1 reasons: .*a\.png is un"
    ):
        open_dataset(root, "semantic", skip_bad=True)


def test_turned_photographs_are_read_upright(folder):
    """A phone stores what it sees lying on its side, and says so."""
    root = folder(mask_of(0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(np.rot90(photograph()).copy())
    turned.save(root / "images" / "a.jpg", exif=exif)
    image, target = open_dataset(root, "semantic")[0]
    assert image.shape[1:] == target["semantic"].shape == (HEIGHT, WIDTH)


@pytest.fixture
def manifest(tmp_path):
    """Writes lines into a manifest beside a picture and its mask."""
    save(tmp_path / "pictures" / "a.png", photograph())
    save(tmp_path / "truth" / "a.png", mask_of(0, 255))

    def write(*lines):
        path = tmp_path / "manifest.jsonl"
        path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
        return path

    return write


LINE = {"id": "a", "image": "pictures/a.png", "mask": "truth/a.png"}
POINTS = {"points": [[0, 0], [4, 9]], "labels": [0, 1]}


def test_manifest(manifest):
    path = manifest(LINE | POINTS | {"split": "train"}, "", LINE | {"split": "val"})
    train = open_dataset(path, "promptable", split="train")
    _, target = train[0]
    assert target["points"].tolist() == [[4, 9]]
    assert target["masks"].shape == (1, HEIGHT, WIDTH)
    assert "points" not in open_dataset(path.parent, "promptable", split="val")[0][1]
    assert open_dataset(path, "semantic", split="val").classes == ["background", "object"]
    for split in (None, "test"):
        with pytest.raises(DataError, match=rf"splits \['train', 'val'\], asked for {split!r}"):
            open_dataset(path, "promptable", split=split)
    assert len(open_dataset(manifest(LINE, LINE), "promptable")) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"manifest\.jsonl:2 is not JSON"),
        ("[]", r"manifest\.jsonl:2 must be an object whose 'image' is a path"),
        ({"image": "a.png"}, r"manifest\.jsonl:2 must be an object whose 'mask' is a path"),
        (LINE | {"image": "b.png"}, r"b\.png is missing"),
        (LINE | {"mask": "b.png"}, r"b\.png is missing"),
        (LINE | {"points": [[1, 2]]}, r"manifest\.jsonl:2: points must be"),
        (LINE | {"points": [[1]], "labels": [1]}, r"manifest\.jsonl:2: points must be"),
        (LINE | {"points": [[10**400, 1]], "labels": [1]}, r"manifest\.jsonl:2: points must be"),
        (
            LINE | {"points": [[30, 2]], "labels": [1]},
            r"jsonl:2: \(30\.0, 2\.0\) is outside the 30x",
        ),
        (
            LINE | {"points": [[8, 2]], "labels": [1]},
            r"jsonl:2: \(8\.0, 2\.0\) is outside the mask",
        ),
    ],
)
def test_manifest_faults(manifest, line, message):
    path = manifest(LINE, line)
    with pytest.raises(DataError, match=message):
        open_dataset(path, "promptable")[1]
    data = open_dataset(path, "promptable", skip_bad=True)
    assert len(data) == len(data.skipped) == 1


def test_progress_is_shown_when_long(folder, monkeypatch, capsys):
    monkeypatch.setattr(dataset, "LONG", 2)
    data = open_dataset(folder(*[mask_of(255)] * 3), "semantic", skip_bad=True)
    assert len(data) == 3
    assert capsys.readouterr().out == ""


def test_digest_is_of_names_sizes_and_classes(folder, tmp_path):
    root = folder(mask_of(0, 1, 2), mask_of(1))
    first = digest(open_dataset(root, "semantic"))
    assert first == digest(open_dataset(root, "semantic"))
    assert len(first) == 64
    moved = shutil.copytree(root, tmp_path / "elsewhere")
    assert digest(open_dataset(moved, "semantic")) == first
    others = [digest(open_dataset(root, "semantic", classes=["background", "x", "y"]))]
    (root / "images" / "a.jpg").write_bytes((root / "images" / "a.jpg").read_bytes() + b"\0")
    others.append(digest(open_dataset(root, "semantic")))
    (root / "images" / "b.jpg").rename(root / "images" / "c.jpg")
    (root / "masks" / "b.png").rename(root / "masks" / "c.png")
    others.append(digest(open_dataset(root, "semantic")))
    assert len({first, *others}) == 4


def test_data_loader(folder):
    """Data sets and transforms go to worker processes, which may be spawned."""
    data = pickle.loads(pickle.dumps(open_dataset(folder(*[mask_of(0, 1, 2)] * 3), "promptable")))
    transform = pickle.loads(pickle.dumps(transforms("promptable", 16, train=True)))
    items = [transform(*data[i]) for i in range(3)]
    ((images, targets),) = DataLoader(items, batch_size=3, collate_fn=collate)
    assert type(images) is torch.Tensor
    assert images.shape == (3, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert [target["original_size"] for target in targets] == [(HEIGHT, WIDTH)] * 3


@pytest.mark.skipif(not ISIC.is_dir(), reason=f"no {ISIC}")
def test_isic_is_the_same_as_a_folder_and_as_a_manifest():
    folder = open_dataset(ISIC, "promptable")
    assert len(folder) == 100
    splits = {json.loads(x)["split"] for x in (ISIC / "manifest.jsonl").read_text().splitlines()}
    listed = [open_dataset(ISIC, "promptable", split=split) for split in sorted(splits)]
    assert sum(map(len, listed)) == 100
    image, target = listed[0][7]
    (same,) = [i for i, record in enumerate(folder.records) if record.files == target["files"]]
    assert torch.equal(folder[same][0], image)
    assert torch.equal(folder[same][1]["masks"], target["masks"])
    assert torch.equal(folder[same][1]["points"], target["points"])
