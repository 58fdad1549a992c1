import numpy as np
import pytest
from PIL import Image

from vfmk.data import DataError, open_dataset

HEIGHT, WIDTH = 20, 30
PERSON, CAT = 15, 8


def save_palette(path, mask):
    file = Image.fromarray(mask).convert("P")
    file.putpalette([value for i in range(256) for value in (i * 37 % 256, i * 91 % 256, i)])
    file.putdata(mask.ravel().tolist())
    file.save(path)


@pytest.fixture
def voc(tmp_path):
    """Two images, each with a person and a cat; a in train, b in val."""
    for name in ("JPEGImages", "SegmentationClass", "SegmentationObject", "ImageSets/Segmentation"):
        (tmp_path / name).mkdir(parents=True)
    classes, objects = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    for index, (label, where) in enumerate(
        [(PERSON, np.s_[2:9, 3:12]), (CAT, np.s_[10:18, 15:29]), (PERSON, np.s_[0:2, 20:25])], 1
    ):
        classes[where], objects[where] = label, index
    classes[9, 3:12] = objects[9, 3:12] = 255
    rng = np.random.default_rng(0)
    for name, split in (("a", "train"), ("b", "val")):
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        save_palette(tmp_path / "SegmentationClass" / f"{name}.png", classes)
        save_palette(tmp_path / "SegmentationObject" / f"{name}.png", objects)
        (tmp_path / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(f"{name}\n")
    return tmp_path


def test_semantic(voc):
    dataset = open_dataset(voc, "semantic", split="train")
    assert len(dataset.classes) == 21
    assert dataset.classes[PERSON] == "person"
    ((image, target),) = (dataset[i] for i in range(len(dataset)))
    assert image.shape == (3, HEIGHT, WIDTH)
    semantic = target["semantic"]
    assert semantic.shape == (HEIGHT, WIDTH)
    assert semantic.unique().tolist() == [0, CAT, PERSON, 255]
    assert semantic[9, 5] == 255
    assert target["files"] == (f"{voc}/JPEGImages/a.jpg", f"{voc}/SegmentationClass/a.png")


@pytest.mark.parametrize("task", ["instance", "detection"])
def test_objects_with_their_classes(voc, task):
    _, target = open_dataset(voc, task, split="val")[0]
    assert target["boxes"].tolist() == [[3, 2, 12, 9], [15, 10, 29, 18], [20, 0, 25, 2]]
    assert target["labels"].tolist() == [PERSON, CAT, PERSON]
    assert target["iscrowd"].tolist() == [False] * 3
    assert len(target["files"]) == 3
    if task == "instance":
        assert target["masks"].sum((1, 2)).tolist() == [63, 112, 10]
    else:
        assert "masks" not in target


def test_promptable(voc):
    dataset = open_dataset(voc, "promptable", split="train")
    assert dataset.classes == ["object"]
    assert dataset[0][1]["masks"].sum((1, 2)).tolist() == [63, 112, 10]


def test_split_is_named(voc):
    for split in (None, "test"):
        with pytest.raises(DataError, match=rf"splits \['train', 'val'\], asked for {split!r}"):
            open_dataset(voc, "semantic", split=split)


def test_a_list_that_is_no_text_is_named(voc):
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"train\.txt is unreadable"):
        open_dataset(voc, "semantic", split="train")


def rewrite(path, change):
    mask = np.array(Image.open(path))
    save_palette(path, change(mask).astype(np.uint8))


def two_classes(voc):
    rewrite(
        voc / "SegmentationClass" / "a.png", lambda m: np.where(m == CAT, np.arange(30) % 2 + 1, m)
    )


def no_class(voc):
    rewrite(voc / "SegmentationClass" / "a.png", lambda m: np.where(m == CAT, 0, m))


def unknown_class(voc):
    rewrite(voc / "SegmentationClass" / "a.png", lambda m: np.where(m == CAT, 21, m))


def no_object(voc):
    rewrite(voc / "SegmentationObject" / "a.png", lambda m: m * 0)


def object_mask_of_another_size(voc):
    rewrite(voc / "SegmentationObject" / "a.png", lambda m: m[:-1])


def missing_image(voc):
    (voc / "JPEGImages" / "a.jpg").unlink()


def missing_mask(voc):
    (voc / "SegmentationObject" / "a.png").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            two_classes,
            r"SegmentationObject/a\.png: object 2 has the classes \[1, 2\] in .*Class/a\.",
        ),
        (no_class, r"SegmentationObject/a\.png: object 2 has the classes \[\] in"),
        (unknown_class, r"SegmentationClass/a\.png holds class 21, there are 21"),
        (no_object, r"SegmentationObject/a\.png is empty"),
        (object_mask_of_another_size, r"Object/a\.png is 30x19 pixels, its image 30x20"),
        (missing_image, r"JPEGImages/a\.jpg is missing"),
        (missing_mask, r"SegmentationObject/a\.png is missing"),
    ],
)
def test_what_does_not_fit_is_named_or_left_out(voc, spoil, message):
    (voc / "ImageSets" / "Segmentation" / "trainval.txt").write_text("a\nb\n")
    spoil(voc)
    with pytest.raises(DataError, match=message):
        open_dataset(voc, "instance", split="trainval")[0]
    dataset = open_dataset(voc, "instance", split="trainval", skip_bad=True)
    assert [record.image.stem for record in dataset.records] == ["b"]
    assert len(dataset.skipped) == 1
