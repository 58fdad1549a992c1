"""mask_iou against SAM's own postprocessing, followed by the score.

Limit for K masks of hw logits of s bytes: Khws bytes; the target and the sizes' maps stay in cache.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vfmk
from bench.harness import Case, measure
from tests.ops.test_mask_iou import blobs, disc

SIZES = {  # low resolution, image size, input size, original size
    "sam": (256, 1024, (768, 1024), (600, 800)),
    "tiny": (32, 128, (96, 128), (600, 800)),
}
CHUNK_BYTES = 256 << 20  # of full-size masks, so that a peer fits into memory
TOLERANCE = 2e-5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    smoke = metafunc.config.getoption("smoke")
    metafunc.parametrize("count", [3] if smoke else [250])
    cuda = metafunc.config.getoption("device") == "cuda"
    metafunc.parametrize("dtype", [torch.bfloat16] if cuda else [torch.float32], ids=str)


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("kind", ["blobs", "noise"])
def bench_mask_iou(benchmark, device, smoke, count, dtype, model, kind):
    side, image_size, input_size, original_size = SIZES[model]
    target = disc(*original_size).to(device)
    chunk = max(1, CHUNK_BYTES // (4 * max(image_size, *original_size) ** 2))

    def inputs() -> tuple[Tensor]:
        random = torch.randn(count, side, side)
        return ((blobs(count, side, side) if kind == "blobs" else random).to(device, dtype),)

    def ours(logits: Tensor) -> Tensor:
        return vfmk.ops.mask_iou(logits, target, input_size, original_size, image_size)

    def of_chunk(logits: Tensor) -> Tensor:
        masks = F.interpolate(logits[:, None], (image_size, image_size), mode="bilinear")
        masks = masks[..., : input_size[0], : input_size[1]]
        masks = F.interpolate(masks, original_size, mode="bilinear")[:, 0] > 0
        union = (masks | target).sum((1, 2))
        return (masks & target).sum((1, 2)) / union.clamp(min=1)

    def postprocess(logits: Tensor) -> Tensor:
        return torch.cat([of_chunk(part.float()) for part in logits.split(chunk)])

    contenders = {"vfmk": ours, "postprocess_masks": postprocess}
    if not smoke:
        torch._dynamo.reset()  # else a limit on recompilation makes it eager in the end
        compiled = torch.compile(of_chunk, dynamic=False)
        contenders["postprocess_masks compiled"] = lambda logits: torch.cat(
            [compiled(part.float()) for part in logits.split(chunk)]
        )
    elements = count * side * side
    pixels = count * original_size[0] * original_size[1]
    case = Case(
        contenders,
        lambda logits: vfmk.reference.mask_iou(
            logits.float(), target, input_size, original_size, image_size
        ),
        inputs,
        "forward",
        elements * torch.empty((), dtype=dtype).element_size(),
        2 * 6 * pixels,
        TOLERANCE,
    )
    benchmark.group = f"mask_iou {count}x{side}x{side} to {original_size} {kind} {dtype}"
    measure(benchmark, case, rounds=3 if smoke else 30 if device == "cuda" else 5)
