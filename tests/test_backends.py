"""Which backend runs is told, and one asked for by name runs or raises."""

import os
import subprocess
import sys

import pytest
import torch

import vfmk
from vfmk import _backends

NAME = "dynamic_depthwise_conv2d"


def call(dtype=torch.float32):
    return vfmk.ops.dynamic_depthwise_conv2d(
        torch.ones(1, 1, 2, 2, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype)
    )


def test_every_backend_is_named_with_a_reason():
    reasons = vfmk.backends()[NAME]
    assert tuple(reasons) == ("cuda", "triton", "cpu", "reference")
    assert reasons["reference"] == ""
    if not torch.cuda.is_available():
        assert "without CUDA" in reasons["cuda"] or "GPU" in reasons["cuda"]


def test_a_backend_asked_for_runs_or_raises(monkeypatch):
    ran = []
    kernels = _backends._kernels(NAME, "reference")
    monkeypatch.setitem(kernels, "forward", lambda *args: ran.append("reference"))
    with vfmk.use_backend("reference"):
        call()
    assert ran == ["reference"]
    with (
        vfmk.use_backend("cuda"),
        pytest.raises(
            vfmk.BackendError, match=rf"^{NAME}: the backend 'cuda' cannot run this call"
        ),
    ):
        call()


def test_the_reason_may_lie_in_the_arguments():
    if reason := vfmk.backends()[NAME]["cpu"]:
        pytest.skip(reason)
    with (
        vfmk.use_backend("cpu"),
        pytest.raises(vfmk.BackendError, match="cpu: float64 has the reference alone"),
    ):
        call(torch.float64)


CHOSEN = """
import torch, vfmk

image, kernel = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)
try:
    vfmk.ops.dynamic_depthwise_conv2d(image, kernel)
except (vfmk.BackendError, ValueError) as error:
    print(error)
with vfmk.use_backend("reference"):  # the block is nearer than the environment
    vfmk.ops.dynamic_depthwise_conv2d(image, kernel)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "the backend 'cuda' cannot run this call"),
        ("fast", "VFMK_BACKEND: 'fast' is no backend"),
    ],
)
def test_the_environment_chooses(name, message):
    """It is read once, when vfmk is imported."""
    printed = subprocess.check_output(
        [sys.executable, "-c", CHOSEN], env=os.environ | {"VFMK_BACKEND": name}, text=True
    )
    assert message in printed


def test_use_backend_ends_with_the_block():
    with (
        pytest.raises(ValueError, match="use_backend: 'gpu' is no backend"),
        vfmk.use_backend("gpu"),
    ):
        pass
    with pytest.raises(ZeroDivisionError), vfmk.use_backend("cuda"):
        raise ZeroDivisionError
    call()


def test_use_backend_has_no_silent_effect_inside_compile():
    def inside(x):
        with vfmk.use_backend("reference"):
            return x + 1

    with pytest.raises(Exception, match=r"no effect inside torch\.compile"):
        torch.compile(inside, backend="eager", fullgraph=True)(torch.ones(1))


def test_the_native_library_is_built():
    """Unless it was left out on purpose: its absence would skip what tests it."""
    if os.environ.get("VFMK_NATIVE") == "0":
        pytest.skip("VFMK_NATIVE=0")
    assert vfmk.backends()[NAME]["cpu"] == ""


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), "9.0", True),
        ((8, 9), "8.6", True),
        ((8, 6), "8.9", False),
        ((9, 0), "8.0", False),
        ((10, 0), "9.0+PTX", True),
        ((10, 3), "12.0+PTX", False),
        ((9, 0), "9.0a", True),
    ],
)
def test_which_machine_code_runs_on_which_gpu(capability, built, runs):
    assert _backends._runs_on(capability, built) == runs


LIGHT = """
import sys, torch, vfmk
heavy = {"triton", "torchvision", "segment_anything", "typer", "matplotlib", "scipy"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
assert not torch.cuda.is_initialized()
"""


def test_import_is_light():
    subprocess.run([sys.executable, "-c", LIGHT], check=True)
