import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors

from vfmk.data import transforms, unletterbox, unletterbox_boxes
from vfmk.data.dataset import boxes_around, object_targets

SIDES = st.integers(1, 90)


def ellipse(height, width, y, x, radius_y, radius_x):
    rows, columns = np.ogrid[:height, :width]
    inside = ((rows - y) / radius_y) ** 2 + ((columns - x) / radius_x) ** 2 <= 1
    return torch.from_numpy(inside)


def instance_target(masks):
    n = len(masks)
    target = object_targets(boxes_around(masks), range(1, n + 1), [False] * n, masks.shape[1:])
    return target | {"masks": tv_tensors.Mask(masks), "files": ("a.jpg",), "image_id": 3}


def image_of(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)
    return tv_tensors.Image(pixels)


def iou(a, b):
    return ((a & b).sum() / (a | b).sum()).item()


@pytest.mark.parametrize("shape", [(427, 640), (640, 427), (1500, 2250), (300, 1200), (1024, 1024)])
def test_masks_come_back(shape):
    height, width = shape
    masks = torch.stack(
        [
            ellipse(height, width, 0.5 * height, 0.4 * width, 0.3 * height, 0.2 * width),
            ellipse(height, width, 0.9 * height, 0.9 * width, 0.2 * height, 0.25 * width),
        ]
    )
    target = {"files": (), "masks": tv_tensors.Mask(masks)}
    image, target = transforms("promptable", 1024, train=False)(image_of(*shape), target)
    assert image.shape == (3, 1024, 1024)
    assert target["original_size"] == shape
    assert max(target["input_size"]) == 1024
    back = unletterbox(target["masks"], target["input_size"], target["original_size"])
    assert back.dtype == torch.bool
    assert back.shape == masks.shape
    for mask, returned in zip(masks, back, strict=True):
        assert iou(mask, returned) > 0.98


def test_letterbox_is_that_of_segment_anything():
    pytest.importorskip("segment_anything")
    from segment_anything.modeling import Sam
    from segment_anything.utils.transforms import ResizeLongestSide

    for shape in ((427, 640), (641, 333), (64, 64), (9, 200)):
        _, target = transforms("promptable", 64, train=False)(image_of(*shape), {"files": ()})
        expected = ResizeLongestSide.get_preprocess_shape(*shape, 64)
        assert target["input_size"] == expected
        logits = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
        sam = type("Encoder", (), {"image_encoder": type("", (), {"img_size": 64})})
        theirs = Sam.postprocess_masks(sam, logits, expected, shape)
        assert torch.equal(unletterbox(logits, expected, shape), theirs)


def test_image_is_resized_and_padded_with_the_mean():
    image = tv_tensors.Image(torch.full((3, 20, 40), 200, dtype=torch.uint8))
    semantic = tv_tensors.Mask(torch.full((20, 40), 3, dtype=torch.uint8))
    square, target = transforms("semantic", 16, train=False)(image, {"semantic": semantic})
    assert target["input_size"] == (8, 16)
    assert (square[:, :8] == 200).all()
    assert (square[:, 8:] == torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1)).all()
    assert (target["semantic"][:8] == 3).all()
    assert (target["semantic"][8:] == 255).all()


@pytest.mark.parametrize("shape", [(2, 1), (50, 2), (2, 50), (1, 1)])
def test_narrow_images_keep_their_colours(shape):
    colour = torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1)
    for size in (1, 5, 20):
        image = tv_tensors.Image(colour.repeat(1, *shape))
        square, target = transforms("detection", size, train=False)(image, {"files": ()})
        h, w = target["input_size"]
        assert (square[:, :h, :w] == colour).all()


def test_mask_and_image_are_resized_alike():
    """Of a bright object, mask and picture are the same to within its edge's pixels; no drift."""
    mask = ellipse(300, 400, 140, 220, 70, 110)
    image = tv_tensors.Image(mask.byte().mul(255).repeat(3, 1, 1))
    square, target = transforms("promptable", 96, train=False)(
        image, {"masks": tv_tensors.Mask(mask[None])}
    )
    bright, shown = square[0, :72] > 127, target["masks"][0, :72]
    assert iou(bright, shown) > 0.98
    for axis in (0, 1):
        centres = [m.nonzero()[:, axis].float().mean() for m in (bright, shown)]
        assert abs(centres[0] - centres[1]) < 0.1  # v2's own resize of a mask: 0.4


def test_object_smaller_than_a_pixel_stays():
    masks = torch.zeros(2, 400, 300, dtype=torch.bool)
    masks[0, 399, 299] = True
    masks[1, 33, 1] = True
    _, target = transforms("promptable", 40, train=False)(
        image_of(400, 300), {"masks": tv_tensors.Mask(masks)}
    )
    assert target["masks"].nonzero().tolist() == [[0, 39, 29], [1, 3, 0]]


@settings(deadline=None, max_examples=60)
@given(height=SIDES, width=SIDES, size=SIDES, data=st.data())
def test_boxes_and_points_come_back(height, width, size, data):
    x0, x1 = sorted(data.draw(st.tuples(*[st.floats(0, width)] * 2)))
    y0, y1 = sorted(data.draw(st.tuples(*[st.floats(0, height)] * 2)))
    boxes = torch.tensor([[x0, y0, x1, y1]])
    target = object_targets(boxes, [1], [False], (height, width))
    _, target = transforms("detection", size, train=False)(image_of(height, width), target)
    assert target["boxes"].canvas_size == (size, size)
    h, w = target["input_size"]
    assert max(h, w) == size
    assert min(h, w) >= 1
    assert (target["boxes"] >= 0).all()
    assert (target["boxes"] <= torch.tensor([w, h, w, h])).all()
    back = unletterbox_boxes(target["boxes"], (h, w), target["original_size"])
    torch.testing.assert_close(torch.as_tensor(back), boxes, atol=1e-4, rtol=1e-5)


@settings(deadline=None, max_examples=100)
@given(
    height=SIDES,
    width=SIDES,
    size=st.integers(2, 90),
    seed=st.integers(0, 2**32),
    n=st.integers(1, 4),
)
def test_jitter_keeps_boxes_tight_and_targets_together(height, width, size, seed, n):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(n, height, width, dtype=torch.bool)
    for mask in masks:
        y, x = (int(torch.randint(side, (), generator=generator)) for side in (height, width))
        mask[y : y + 1 + height // 3, x : x + 1 + width // 3] = True
    torch.manual_seed(seed)
    image, target = transforms("instance", size, train=True)(
        image_of(height, width), instance_target(masks)
    )
    assert image.shape == (3, size, size)
    assert image.dtype == torch.uint8
    assert target["masks"].shape[1:] == (size, size)
    assert target["masks"].dtype == torch.bool
    assert torch.equal(torch.as_tensor(target["boxes"]), boxes_around(target["masks"]))
    counts = [len(target[key]) for key in ("masks", "boxes", "labels", "iscrowd")]
    assert counts == [counts[0]] * 4
    assert target["masks"].flatten(1).any(1).all()
    h, w = target["input_size"]
    assert not target["masks"][:, h:].any()
    assert not target["masks"][:, :, w:].any()
    assert target["image_id"] == 3


@settings(deadline=None, max_examples=100)
@given(height=SIDES, width=SIDES, size=st.integers(1, 90), seed=st.integers(0, 2**32))
def test_jitter_always_shows_a_promptable_object(height, width, size, seed):
    rng = np.random.default_rng(seed)
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    corners = [(int(rng.integers(height)), int(rng.integers(width))) for _ in masks]
    for mask, (y, x) in zip(masks, corners, strict=True):
        mask[y, x] = True
    points = torch.tensor([[x, y] for y, x in corners], dtype=torch.float32)
    target = {
        "masks": tv_tensors.Mask(masks),
        "points": tv_tensors.KeyPoints(points, canvas_size=(height, width)),
    }
    torch.manual_seed(seed)
    _, target = transforms("promptable", size, train=True)(image_of(height, width), target)
    assert len(target["masks"]) == len(target["points"]) >= 1
    assert target["masks"].flatten(1).any(1).all()
    assert target["points"].isfinite().all()  # each is on its object's only pixel


def test_jitter_moves_everything_alike():
    """The picture is the mask, the semantic mask and the point's place at once."""
    mask = ellipse(60, 80, 28, 33, 14, 12)
    image = tv_tensors.Image(mask.byte().mul(255).repeat(3, 1, 1))
    transform = transforms("promptable", 64, train=True, jitter=(0.5, 2.0))
    sizes, mirrored = set(), set()
    torch.manual_seed(0)
    for _ in range(30):
        point = torch.tensor([[30.0, 28.0]])
        target = {
            "masks": tv_tensors.Mask(mask[None]),
            "semantic": tv_tensors.Mask(mask.byte()),
            "points": tv_tensors.KeyPoints(point, canvas_size=(60, 80)),
        }
        square, target = transform(image, target)
        h, w = target["input_size"]
        sizes.add((h, w))
        shown = target["masks"][0]
        assert torch.equal(target["semantic"][:h, :w].bool(), shown[:h, :w])
        assert (target["semantic"][h:] == 255).all()
        assert iou(square[0, :h, :w] > 127, shown[:h, :w]) > 0.9
        x, y = target["points"][0]
        if not x.isnan():
            assert shown[int(y), int(x)]
            mirrored.add(bool(x > shown[int(y)].nonzero().float().mean()))
    assert len(sizes) > 10
    assert mirrored == {False, True}


def test_tiny_boxes_are_dropped_in_training_alone():
    target = object_targets(
        torch.tensor([[10, 10, 90, 90], [5, 5, 5.5, 50.0]]), [1, 2], [False, True], (100, 100)
    )
    _, kept = transforms("detection", 64, train=False)(image_of(100, 100), target)
    assert kept["labels"].tolist() == [1, 2]
    train = transforms("detection", 64, train=True, jitter=(1, 1))
    _, dropped = train(image_of(100, 100), target)
    assert dropped["labels"].tolist() == [1]
    assert dropped["iscrowd"].tolist() == [False]
    assert dropped["boxes"].shape == (1, 4)


def test_image_without_objects():
    empty = torch.zeros(0, 30, 40, dtype=torch.bool)
    for train in (False, True):
        _, target = transforms("instance", 32, train=train)(
            image_of(30, 40), instance_target(empty)
        )
        assert target["masks"].shape == (0, 32, 32)
        assert target["boxes"].shape == (0, 4)
    back = unletterbox(target["masks"], target["input_size"], target["original_size"])
    assert back.shape == (0, 30, 40)


def test_seed_fixes_the_transform():
    transform = transforms("semantic", 32, train=True)
    semantic = tv_tensors.Mask(torch.randint(5, (40, 50), dtype=torch.uint8))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(transform(image_of(40, 50), {"semantic": semantic}))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1]["semantic"], results[1][1]["semantic"])
    assert not torch.equal(results[0][0], results[2][0])


def test_unletterbox_keeps_leading_dimensions():
    logits = torch.randn(2, 3, 1, 16, 16)
    assert unletterbox(logits, (12, 16), (24, 32)).shape == (2, 3, 1, 24, 32)
    assert unletterbox(logits[0, 0, 0], (12, 16), (24, 32)).shape == (24, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("panoptic", 32, True), "task must be one of promptable, .* got 'panoptic'"),
        (("semantic", 0, True), "size must be positive, got 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        transforms(*arguments)
    with pytest.raises(ValueError, match=r"jitter must be 0 < low <= high, got \(2, 1\)"):
        transforms("semantic", 32, True, jitter=(2, 1))
