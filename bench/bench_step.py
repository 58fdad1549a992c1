"""A training step of what adapts SAM's image encoder: forward, backward and AdamW.

Ours is VFM-Adapter in the accelerated encoder; beside it the same in eager segment-anything, LoRA
of peft and full fine-tuning in both. The last two train other parameters, so each encoder is
checked against its own method in eager float32. Weights, activations and moments have one dtype.
Peak memory here is all that a method holds: weights, moments and gradients too. LoRA is left out
where peft is not installed.
"""

import copy
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor

from bench import encoders
from bench.harness import compare, cuda_peak_bytes
from bench.peak import peak_bytes
from tests.operator_checks import relative_error

# Of the embedding, and of all gradients together.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
LEARNING_RATE = 1e-6  # so small that the steps of a run change nothing


class Step:
    """One step on `images`."""

    def __init__(self, encoder: ImageEncoderViT, images: Tensor) -> None:
        self.encoder, self.images = encoder, images
        self.optimizer = torch.optim.AdamW(encoders.trained(encoder), LEARNING_RATE)
        grid = (side // encoders.PATCH for side in images.shape[2:])
        self.cotangent = images.new_ones(len(images), encoders.OUT_CHANNELS, *grid)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.encoder(self.images).backward(self.cotangent)
        self.optimizer.step()


def embedding_and_gradients(encoder: ImageEncoderViT, images: Tensor) -> tuple[Tensor, Tensor]:
    embedding = encoder(images.to(next(encoder.parameters()).dtype))
    cotangent = torch.linspace(-1, 1, embedding.numel()).to(embedding).view_as(embedding)
    gradients = torch.autograd.grad(embedding, encoders.trained(encoder), cotangent)
    return embedding.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def check(
    name: str, encoder: ImageEncoderViT, truth: tuple[Tensor, Tensor], images: Tensor
) -> None:
    for actual, true in zip(embedding_and_gradients(encoder, images), truth, strict=True):
        error = relative_error(actual, true)
        if not error <= TOLERANCE[images.dtype]:
            raise AssertionError(f"{name} is wrong: relative error {error:.2e}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cuda = metafunc.config.getoption("device") == "cuda"
    case = ("ViT-B", 4, 1024) if cuda else ("ViT-B", 1, 256)
    if metafunc.config.getoption("smoke"):
        case = ("tiny", 1, 64)
    metafunc.parametrize(("name", "batch", "size"), [case])


def bench_step(benchmark, device, smoke, name, batch, size):
    cuda = device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    frozen = encoders.build(name, size, device)
    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    ways = {"accelerated": encoders.accelerated, "eager": copy.deepcopy}
    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    for method, prepare in encoders.METHODS.items():
        if method == "LoRA" and find_spec("peft") is None:
            continue
        encoder = copy.deepcopy(frozen)
        prepare(encoder)
        truth = embedding_and_gradients(encoder, images)
        encoder.to(dtype)
        ours = method == "VFM-Adapter"
        compiled = {"eager, compiled": encoders.compiled} if cuda and ours else {}
        for way, make in (ways | compiled).items():
            peer = f"{method}, {way}"
            if ours:  # vfmk, and the same model without it
                peer = "vfmk" if way == "accelerated" else way
            before = torch.cuda.memory_allocated() if cuda else 0
            steps[peer] = step = Step(make(encoder), images)
            check(peer, step.encoder, truth, images)
            if cuda:
                step()  # what is set up once, at the first step, is no part of a step
                peaks[peer] = cuda_peak_bytes(step, before)
            elif not smoke or peer == "vfmk":
                peaks[peer] = peak_bytes(partial(Step, step.encoder, images), standing=True)
    benchmark.group = f"{name} training step {batch}x{size}x{size} {dtype}"
    compare(
        benchmark,
        steps,
        torch.device(device),
        "step",
        2 * encoders.bytes_of(frozen.to(dtype), images),
        encoders.flop_of(name, batch, size, "step"),
        rounds=10 if cuda else 4,
    )
    benchmark.extra_info["peak_bytes"] = peaks
