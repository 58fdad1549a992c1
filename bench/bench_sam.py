"""SAM's whole image encoder, forward; what is counted: bench/encoders.py."""

import copy
from functools import partial

import pytest
import torch

from bench import encoders
from bench.harness import Case, measure

CPU_CASES = [("ViT-B", 1, 1024), ("ViT-B", 1, 512)]
CUDA_CASES = [("ViT-B", 8, 1024), ("ViT-L", 8, 1024), ("ViT-H", 8, 1024)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = CUDA_CASES if metafunc.config.getoption("device") == "cuda" else CPU_CASES
    if metafunc.config.getoption("smoke"):
        cases = [("tiny", 1, 64)]
    metafunc.parametrize(("name", "batch", "size"), cases)


def bench_encoder(benchmark, device, smoke, name, batch, size):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    full = encoders.build(name, size, device)
    encoder = copy.deepcopy(full).to(dtype)
    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    peers = {"vfmk": encoders.accelerated(encoder), "eager": encoder}
    if device == "cuda":
        peers["eager, compiled"] = encoders.compiled(encoder)
    contenders = {name: partial(encoders.encode, encoder=peer) for name, peer in peers.items()}
    floor = partial(encoders.encode, encoder=encoders.unbiased(encoder))
    benchmark.group = f"{name} encoder {batch}x{size}x{size} {dtype}"
    measure(
        benchmark,
        Case(
            contenders,
            partial(encoders.encode, encoder=full),
            lambda: (torch.randn_like(images),),
            "forward",
            encoders.bytes_of(encoder, images),
            encoders.flop_of(name, batch, size, "forward"),
            encoders.TOLERANCE[dtype],
            {"sdpa, no bias": floor},
            reference_dtype=torch.float32,
            memory=[] if smoke else [*contenders, "sdpa, no bias"],
        ),
        rounds=3 if smoke or device == "cpu" else 10,
    )
