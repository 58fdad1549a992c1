import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("pycocotools")

from pycocotools import mask as mask_api

from vfmk.data import DataError, open_dataset

HEIGHT, WIDTH = 20, 30
SQUARE = [4, 2, 21, 2, 21, 11, 4, 11]  # a polygon; in pixels, rows 2 to 10 and columns 4 to 20


def rectangle(top, left, bottom, right):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def uncompressed(mask):
    """Run lengths by the format's definition: down the columns, zeros first."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


def compressed(mask):
    rle = mask_api.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def annotation(id, category_id=7, bbox=(4, 2, 17, 9), segmentation=(SQUARE,), **others):
    segmentation = list(segmentation) if isinstance(segmentation, tuple) else segmentation
    entry = {"id": id, "image_id": 11, "category_id": category_id, "bbox": list(bbox)}
    return entry | {"segmentation": segmentation, "iscrowd": 0} | others


@pytest.fixture
def content():
    """Image 11 with a polygon, both run lengths and a crowd; image 12 with nothing."""
    image = {"height": HEIGHT, "width": WIDTH}
    crowd = rectangle(0, 0, 20, 3)
    ragged = rectangle(12, 5, 15, 9) | rectangle(14, 8, 19, 28) | rectangle(0, 29, 20, 30)
    return {
        "images": [
            image | {"id": 11, "file_name": "a.png"},
            image | {"id": 12, "file_name": "b.png"},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 7, "name": "cat"}],
        "annotations": [
            annotation(1),
            annotation(2, 9, (5, 12, 4, 3), uncompressed(rectangle(12, 5, 15, 9))),
            annotation(3, 9, (5, 0, 25, 20), compressed(ragged)),
            annotation(4, 7, (0, 0, 3, 20), uncompressed(crowd), iscrowd=1),
        ],
    }


@pytest.fixture
def write(tmp_path, content):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    for name in "ab":
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")

    def write():
        path = tmp_path / "annotations" / "instances_train2017.json"
        path.write_text(json.dumps(content))
        return path

    return write


def test_instances(write):
    path = write()
    dataset = open_dataset(path, "instance")
    assert dataset.classes == ["background", "cat", "dog"]
    assert len(dataset) == 2
    image, target = dataset[0]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert image.dtype == torch.uint8
    assert target["image_id"] == 11
    assert target["files"] == (str(path.parents[1] / "images" / "a.png"), str(path))
    assert target["labels"].tolist() == [1, 2, 2, 1]
    assert target["iscrowd"].tolist() == [False, False, False, True]
    assert target["boxes"].tolist() == [
        [4, 2, 21, 11],
        [5, 12, 9, 15],
        [5, 0, 30, 20],
        [0, 0, 3, 20],
    ]
    assert target["boxes"].dtype == torch.float32
    expected = [
        rectangle(2, 4, 11, 21),
        rectangle(12, 5, 15, 9),
        rectangle(12, 5, 15, 9) | rectangle(14, 8, 19, 28) | rectangle(0, 29, 20, 30),
        rectangle(0, 0, 20, 3),
    ]
    assert target["masks"].dtype == torch.bool
    assert np.array_equal(target["masks"].numpy(), expected)


def test_image_without_annotations_is_background(write):
    for task in ("instance", "detection"):
        _, target = open_dataset(write(), task)[1]
        assert target["boxes"].shape == (0, 4)
        assert target["labels"].shape == target["iscrowd"].shape == (0,)
        assert target["image_id"] == 12
        assert ("masks" in target) == (task == "instance")
    assert target.keys() == {"files", "boxes", "labels", "iscrowd", "image_id"}


def test_promptable_objects_are_no_crowds(write, content):
    with pytest.raises(DataError, match=r"image 12, b\.png, has no object to prompt"):
        open_dataset(write(), "promptable")
    content["images"].pop()
    dataset = open_dataset(write(), "promptable")
    assert dataset[0][1]["masks"].shape == (3, HEIGHT, WIDTH)


def test_semantic_has_the_smaller_object_on_top(write):
    dataset = open_dataset(write(), "semantic")
    semantic = dataset[0][1]["semantic"]
    assert semantic.shape == (HEIGHT, WIDTH)
    assert semantic[12, 5] == 2
    assert semantic[2, 4] == 1
    assert semantic[0, 0] == 1
    assert semantic[0, 20] == 0
    assert not dataset[1][1]["semantic"].any()


def test_folder_and_classes_of_another_split(write):
    root = write().parents[1]
    classes = ["background", "bird", "dog", "cat"]
    dataset = open_dataset(root, "detection", split="train", classes=classes)
    assert dataset.classes == classes
    assert dataset[0][1]["labels"].tolist() == [3, 2, 2, 3]
    (root / "annotations" / "captions_train2017.json").write_text("{}")
    assert len(open_dataset(root, "detection", split="train")) == 2
    with pytest.raises(DataError, match=r"instances_train2017.*asked for the split 'val'"):
        open_dataset(root, "detection", split="val")
    with pytest.raises(DataError, match="'cat' is not among"):
        open_dataset(root, "detection", classes=["background", "dog"])


def test_box_is_clipped_of_a_rounding_error(write, content):
    content["annotations"] = [annotation(1, bbox=(-0.3, 2, 30.8, 18.01))]
    _, target = open_dataset(write(), "detection")[0]
    assert target["boxes"].tolist() == [[0, 2, WIDTH, HEIGHT]]


RUNS = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH - 1]}
FAULTS = {
    "unknown category": (
        annotation(5, 8),
        r"instances_train2017\.json: annotation 5, of image 11, has the unknown category 8",
    ),
    "unknown image": (annotation(5, image_id=99), "annotation 5 is for image 99, which is not"),
    "box outside": (
        annotation(5, bbox=(25, 2, 10, 9)),
        r"annotation 5, of image 11, has the bbox \[25, 2, 10, 9\], outside its 30x20 image",
    ),
    "degenerate box": (annotation(5, bbox=(4, 2, 0, 9)), r"annotation 5.* degenerate bbox \[4"),
    "three numbers": (annotation(5, bbox=(4, 2, 9)), r"annotation 5.* bbox \[4, 2, 9\], expected"),
    "nan": (annotation(5, bbox=(4, 2, 9, float("nan"))), "annotation 5.*nan.*, expected"),
    "no mask": (annotation(5, segmentation=None), "annotation 5.* has no segmentation"),
    "no polygon": (annotation(5, segmentation=()), "annotation 5.* has no segmentation"),
    "two points": (annotation(5, segmentation=([1, 1, 5, 5],)), "annotation 5.* polygon"),
    "mask of another size": (
        annotation(5, segmentation=RUNS | {"size": [WIDTH, HEIGHT]}),
        r"annotation 5.* run lengths of size \[30, 20\], its image is \[20, 30\]",
    ),
    "short runs": (annotation(5, segmentation=RUNS), "annotation 5.* do not add up to 600"),
    "negative run": (
        annotation(5, segmentation=RUNS | {"counts": [-1, 601]}),
        "annotation 5.* do not add up",
    ),
    "short string": (
        annotation(5, segmentation=RUNS | {"counts": "52"}),
        "annotation 5.* do not add up",
    ),
    "cut string": (
        annotation(5, segmentation=RUNS | {"counts": "o"}),
        "annotation 5.* do not add up",
    ),
    "odd character": (
        annotation(5, segmentation=RUNS | {"counts": "\x10é"}),
        "annotation 5.* do not add up",
    ),
    "iscrowd": (annotation(5, iscrowd=2), "annotation 5.* has iscrowd 2"),
    "no category": (annotation(5, [7]), r"annotation 5.* unknown category \[7\]"),
    "no image": (annotation(5, image_id=[11]), r"annotation 5 is for image \[11\], which is not"),
    "endless": (annotation(5, bbox=(4, 2, 10**400, 9)), "annotation 5.* outside its 30x20 image"),
    "polygon outside": (
        annotation(5, segmentation=([4, 2, 32, 2, 21, 11],)),
        "annotation 5.* polygon outside its 30x20 image",
    ),
    "polygon far outside": (
        annotation(5, segmentation=([4, -1e9, 21, 2, 21, 11],)),
        "annotation 5.* polygon outside its 30x20 image",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_annotation_is_named_or_left_out(write, content, fault):
    entry, message = FAULTS[fault]
    content["annotations"].append(entry)
    with pytest.raises(DataError, match=message):
        open_dataset(write(), "instance")
    dataset = open_dataset(write(), "instance", skip_bad=True)
    assert len(dataset) == (2 if fault in ("unknown image", "no image") else 1)
    (reason,) = dataset.skipped
    assert "annotation 5" in reason


def test_annotations_have_an_id_of_their_own(write, content):
    content["annotations"].append(annotation(4, image_id=12))
    with pytest.raises(DataError, match=r"annotation 4, of image 11, has the id of another"):
        open_dataset(write(), "detection")
    with pytest.raises(DataError, match=r"no usable record, the first of 2 reasons: .*tation 4"):
        open_dataset(write(), "detection", skip_bad=True)
    content["annotations"][-1] = annotation("5", image_id=12)
    with pytest.raises(DataError, match="annotation 5, of image 12, has no integer id"):
        open_dataset(write(), "detection")


def test_boxes_are_enough_for_detection(write, content):
    for entry in content["annotations"]:
        del entry["segmentation"]
    assert open_dataset(write(), "detection")[0][1]["boxes"].shape == (4, 4)
    with pytest.raises(DataError, match="annotation 1, of image 11, has no segmentation"):
        open_dataset(write(), "instance")


def test_more_categories_than_a_semantic_mask_can_tell_apart(write, content):
    content["categories"] += [{"id": id, "name": str(id)} for id in range(100, 352)]
    assert len(open_dataset(write(), "semantic").classes) == 255
    content["categories"] += [{"id": id, "name": str(id)} for id in range(400, 500)]
    content["annotations"][0]["category_id"] = 499
    path = write()
    with pytest.raises(
        DataError, match=r"2017\.json has 355 classes .*, semantic masks at most 255"
    ):
        open_dataset(path, "semantic")
    dataset = open_dataset(path, "instance")
    assert dataset[0][1]["labels"].tolist() == [354, 2, 2, 1]
    again = open_dataset(path, "instance", classes=dataset.classes)
    assert again[0][1]["labels"].tolist() == [354, 2, 2, 1]


def test_faults_found_at_reading(write, content):
    content["images"][1]["width"] += 1
    nothing = uncompressed(rectangle(0, 0, 0, 0))
    content["annotations"].append(annotation(5, segmentation=nothing))
    dataset = open_dataset(write(), "instance")
    with pytest.raises(DataError, match=r"b\.png is 30x20 pixels, .*\.json says 31x20"):
        dataset[1]
    with pytest.raises(DataError, match="annotation 5 covers no pixel"):
        dataset[0]
    with pytest.raises(
        DataError, match=r"no usable record, the first of 2 reasons: .*annotation 5"
    ):
        open_dataset(write(), "instance", skip_bad=True)


def test_missing_image(write, content):
    content["images"][1]["file_name"] = "c.png"
    with pytest.raises(DataError, match=r"image 12, .*c\.png, is missing"):
        open_dataset(write(), "instance")
    content["images"][0]["file_name"] = "d.png"
    with pytest.raises(DataError, match=r"none of its 2 images is in .*annotations, .*images"):
        open_dataset(write(), "instance")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"\.json is unreadable"),
        ("[]", "is not COCO JSON: it has no list of objects 'images'"),
        ('{"images": [], "annotations": {}}', "no list of objects 'annotations'"),
    ],
)
def test_other_json(write, text, message):
    path = write()
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        open_dataset(path, "detection")


@pytest.mark.parametrize(
    ("key", "entry", "message"),
    [
        ("images", {"id": 11, "file_name": "a.png", "height": 20, "width": 30}, "two images 11"),
        ("images", {"id": 13, "file_name": "a.png"}, "image 13 has no height and width"),
        (
            "images",
            {"id": 13, "file_name": "a.png", "height": 20, "width": 10**400},
            "image 13 has no height and width",
        ),
        ("images", {"id": "13", "file_name": "a.png"}, "no integer id and file_name"),
        ("categories", {"id": 7, "name": "bird"}, "id or name occurs twice"),
        ("categories", {"id": 8}, "no integer id and name"),
    ],
)
def test_bad_image_and_category(write, content, key, entry, message):
    content[key].append(entry)
    with pytest.raises(DataError, match=message):
        open_dataset(write(), "detection")


def test_run_lengths_of_every_mask_are_read():
    from vfmk.data.coco import _decompress

    rng = np.random.default_rng(0)
    for share in (0, 0.01, 0.5, 1):
        mask = (rng.random((97, 61)) < share).astype(np.uint8)
        assert sum(_decompress(compressed(mask)["counts"])) == mask.size
