"""mask_iou on every backend that runs here, against SAM's own two interpolations."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vfmk
from tests import operator_checks
from tests.operator_checks import Call

NAME = "mask_iou"
TARGETS = [parameter for parameter in operator_checks.TARGETS if parameter.id != "cuda"]
SAM = (256, 256, 1024)  # low-resolution height and width, image size
TINY = (32, 32, 128)
GEOMETRIES = {  # low resolution and image size, input size, original size
    "sam, landscape": (SAM, (768, 1024), (600, 800)),
    "sam, portrait": (SAM, (1024, 683), (301, 201)),
    "tiny": (TINY, (96, 128), (150, 200)),
    "tiny, enlarged": (TINY, (128, 86), (401, 270)),
    "tiny, reduced": (TINY, (128, 128), (20, 23)),
    "tiny, one pixel": (TINY, (128, 3), (1, 1)),
    "reduced to the image": ((40, 70, 24), (20, 24), (31, 65)),
    "one logit": ((1, 1, 8), (5, 8), (11, 67)),
    "one column": ((5, 1, 8), (8, 8), (64, 64)),
}


def full_size(logits, input_size, original_size, image_size) -> Tensor:
    """As `Sam.postprocess_masks` does it."""
    masks = F.interpolate(
        logits[:, None], (image_size, image_size), mode="bilinear", align_corners=False
    )
    masks = masks[..., : input_size[0], : input_size[1]]
    return F.interpolate(masks, original_size, mode="bilinear", align_corners=False)[:, 0]


def bounds(masks: Tensor, target: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The least and the greatest IoU if pixels within rounding of the threshold may fall anywhere.

    Rounding: of two interpolations in fp32, each of whose positions is right to half a last place
    of 1024: 3e-5 of the step to the next logit.
    """
    slack = 1e-4 * float(masks.abs().max())
    sure, unsure = masks > threshold + slack, (masks - threshold).abs() <= slack
    good, bad = sure | (unsure & target), sure | (unsure & ~target)
    least = (sure & target).sum((1, 2)) / (bad | target).sum((1, 2)).clamp(min=1)
    greatest = (good & target).sum((1, 2)) / (sure | target).sum((1, 2)).clamp(min=1)
    return least, greatest


def blobs(count: int, height: int, width: int) -> Tensor:
    """Logits with smooth contours, some masks large, some small, one empty, one full."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 1, 5, 5, generator=generator)
    logits = 6 * F.interpolate(coarse, (height, width), mode="bicubic")[:, 0]
    logits += torch.linspace(-8, 8, count)[:, None, None]
    logits[0], logits[-1] = -3, 3
    return logits


def disc(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (y - 0.4 * height) ** 2 + (x - 0.6 * width) ** 2 < (0.3 * min(height, width) + 1) ** 2


@pytest.fixture(params=TARGETS)
def device(request):
    backend, device = request.param
    with operator_checks.target(NAME, backend):
        yield device


def check(device, logits, target, input_size, image_size, threshold=0.0):
    size = tuple(target.shape)
    iou = vfmk.ops.mask_iou(
        logits.to(device), target.to(device), input_size, size, image_size, threshold=threshold
    )
    assert iou.dtype == torch.float32
    masks = full_size(logits.float(), input_size, size, image_size)
    least, greatest = bounds(masks, target, threshold)
    assert (iou.cpu() >= least - 1e-6).all()
    assert (iou.cpu() <= greatest + 1e-6).all()
    return iou.cpu(), masks


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", ["blobs", "noise"])
def test_equals_sam(device, geometry, kind):
    (height, width, image_size), input_size, original_size = GEOMETRIES[geometry]
    count = 4 if height == 256 else 9
    logits = blobs(count, height, width)
    if kind == "noise":
        logits = torch.randn(count, height, width, generator=torch.Generator().manual_seed(0))
    target = disc(*original_size)
    iou, masks = check(device, logits, target, input_size, image_size)
    if kind == "blobs":  # where a pixel or two at the threshold do not matter
        above = masks > 0
        union = (above | target).sum((1, 2))
        expected = (above & target).sum((1, 2)) / union.clamp(min=1)
        assert (iou - expected).abs().max() <= max(2e-5, 1 / (1 + int(union.max())))


def test_equals_sam_itself(device):
    sam = vfmk.load_sam("tiny")
    logits = blobs(6, 32, 32)
    masks = sam.postprocess_masks(logits[:, None], (96, 128), (150, 200))[:, 0] > 0
    target = disc(150, 200)
    expected = (masks & target).sum((1, 2)) / (masks | target).sum((1, 2))
    iou = vfmk.ops.mask_iou(
        logits.to(device), target.to(device), (96, 128), (150, 200), sam.image_encoder.img_size
    )
    assert torch.allclose(iou.cpu(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(device, dtype):
    check(device, blobs(5, 32, 32).to(dtype), disc(90, 120), (96, 128), 128)


@pytest.mark.parametrize("threshold", [-1.5, 2])
def test_threshold(device, threshold):
    check(device, blobs(5, 32, 32), disc(90, 120), (96, 128), 128, threshold)


def test_views(device):
    logits = blobs(12, 40, 80)
    for view in (logits[::2, 4:36, 7:39], logits[:, :32, ::2][:, :, 4:36], logits[:3].mT[:, :32]):
        check(device, view, disc(90, 120), (96, 128), 128)
    check(device, blobs(5, 32, 32), disc(120, 90).T, (96, 128), 128)
    check(device, blobs(1, 32, 32).expand(4, -1, -1), disc(90, 120), (96, 128), 128)


def test_empty(device):
    nothing = torch.zeros(60, 80, dtype=torch.bool, device=device)
    logits = torch.full((2, 32, 32), -1.0, device=device)
    logits[1] = 1
    iou = vfmk.ops.mask_iou(logits, nothing, (96, 128), (60, 80), 128)
    assert iou.tolist() == [0, 0]
    iou = vfmk.ops.mask_iou(logits, ~nothing, (96, 128), (60, 80), 128)
    assert iou.tolist() == [0, 1]
    assert vfmk.ops.mask_iou(logits[:0], nothing, (96, 128), (60, 80), 128).shape == (0,)


def test_float64_goes_to_the_reference():
    check("cpu", blobs(3, 32, 32).double(), disc(90, 120), (96, 128), 128)


def test_no_gradient(device):
    logits = blobs(3, 32, 32).to(device).requires_grad_()
    iou = vfmk.ops.mask_iou(logits, disc(90, 120).to(device), (96, 128), (90, 120), 128)
    assert not iou.requires_grad


def test_same_bits_for_any_number_of_threads():
    before = torch.get_num_threads()
    with operator_checks.target(NAME, "cpu"):
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            iou = vfmk.ops.mask_iou(blobs(9, 32, 32), disc(90, 120), (96, 128), (90, 120), 128)
            results.append(iou)
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    low=st.tuples(st.integers(1, 70), st.integers(1, 140)),
    image_size=st.integers(1, 130),
    cut=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    original=st.tuples(st.integers(1, 90), st.integers(1, 200)),
)
def test_any_shape(device, low, image_size, cut, original):
    input_size = tuple(max(1, round(share * image_size)) for share in cut)
    check(device, blobs(3, *low), disc(*original), input_size, image_size)


KWARGS = {"input_size": (96, 128), "original_size": (90, 120), "image_size": 128}
LOGITS, MASK = torch.zeros(2, 32, 32), torch.zeros(90, 120, dtype=torch.bool)


def test_opcheck(device):
    args = (LOGITS.to(device), MASK.to(device), (96, 128), 128, 0.0)
    operator_checks.check_opcheck(torch.ops.vfmk.mask_iou.default, args)


def test_compile_and_export(device):
    def function(logits, target):
        return vfmk.ops.mask_iou(logits, target, **KWARGS)

    args = (blobs(3, 32, 32).to(device), disc(90, 120).to(device))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), function(*args))
    call = Call(function, function, function)
    function.__name__ = NAME
    operator_checks.check_export(call, args)


def test_autocast_changes_nothing(device):
    args = (blobs(3, 32, 32).to(device), disc(90, 120).to(device))
    expected = vfmk.ops.mask_iou(*args, **KWARGS)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(vfmk.ops.mask_iou(*args, **KWARGS), expected)


def test_meta_tensors():
    assert vfmk.ops.mask_iou(LOGITS.to("meta"), MASK.to("meta"), **KWARGS).shape == (2,)


def test_cuda_graph(device):
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    args = (blobs(3, 32, 32).to(device), disc(90, 120).to(device))
    expected = vfmk.ops.mask_iou(*args, **KWARGS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = vfmk.ops.mask_iou(*args, **KWARGS)
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)


BAD_INPUT = [  # arguments, keyword arguments, exception, message
    ((None, MASK), {}, TypeError, r"logits must be a Tensor \[K, h, w\], got NoneType"),
    ((LOGITS.int(), MASK), {}, TypeError, "logits must be float32.*got int32"),
    ((LOGITS[0], MASK), {}, ValueError, r"logits must have the shape \[K, h, w\], got \[32, 32\]"),
    ((LOGITS[:, :0], MASK), {}, ValueError, r"logits has an empty mask, \[2, 0, 32\]"),
    ((LOGITS, None), {}, TypeError, r"target must be a Tensor \[H, W\], got NoneType"),
    ((LOGITS, MASK.float()), {}, TypeError, "target must be bool, got float32"),
    ((LOGITS, MASK[None]), {}, ValueError, r"target must have the shape \[H, W\], got \[1, 90"),
    ((LOGITS, MASK.to("meta")), {}, ValueError, "target is on meta, logits is on cpu"),
    ((LOGITS, MASK[1:]), {}, ValueError, r"target has the shape \[89, 120\], original_size is"),
    ((LOGITS, MASK), {"input_size": (0, 128)}, ValueError, "input_size must be at least 1"),
    ((LOGITS, MASK), {"input_size": (96, 129)}, ValueError, r"input_size \(96, 129\) exceeds"),
    ((LOGITS, MASK), {"input_size": 9.5}, TypeError, "input_size must be an int or a pair"),
    ((LOGITS, MASK), {"original_size": (90,)}, TypeError, "original_size must be an int or a pair"),
    ((LOGITS, MASK), {"image_size": (128, 96)}, TypeError, "image_size must be an int, got"),
    ((LOGITS, MASK), {"image_size": 0}, ValueError, "image_size must be at least 1"),
    ((LOGITS, MASK), {"threshold": None}, TypeError, "threshold must be a number, got None"),
    ((LOGITS, MASK), {"threshold": float("nan")}, ValueError, "threshold must be finite"),
]


@pytest.mark.parametrize(("args", "kwargs", "exception", "message"), BAD_INPUT)
def test_bad_input(args, kwargs, exception, message):
    with pytest.raises(exception, match=f"^{NAME}: .*{message}"):
        vfmk.ops.mask_iou(*args, **(KWARGS | kwargs))
