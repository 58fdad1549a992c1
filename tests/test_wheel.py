"""The wheel: one for every CPython, with kernels, weights and library inside."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vfmk import _backends

ROOT = Path(__file__).parents[1]
RUN = """
import json, torch, vfmk
output = vfmk.ops.dynamic_depthwise_conv2d(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3))
assert output[0, 0, 1, 1] == 9
print(json.dumps([vfmk.__file__, vfmk.backends()["dynamic_depthwise_conv2d"]]))
"""


@pytest.fixture(scope="module")
def wheel(built):
    """Built with the objects at hand, so that only what changed is compiled."""
    if not _backends.LIBRARY.exists():
        pytest.skip("the installed package has no native library")

    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder)]
        subprocess.run([*command, "--no-build-isolation", "."], cwd=ROOT, check=True)

    return next(built("wheel", make).glob("*.whl"))


@pytest.fixture
def unpacked(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def backends_of(folder: Path) -> dict[str, str]:
    """Of the package unpacked in `folder`, after a call."""
    command = [sys.executable, "-c", RUN]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    answer = subprocess.run(
        command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    file, backends = json.loads(answer.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(folder)
    return backends


def test_one_wheel_for_every_python(wheel):
    name, _, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("vfmk", "py3", "none")
    assert platform.startswith("linux_")


def test_holds_kernels_library_and_weights(unpacked):
    for path in (
        "vfmk/kernels/dynamic_depthwise_conv2d.py",
        "vfmk/libvfmk.so",
        "vfmk/py.typed",
        "vfmk/sam/weights/tiny.safetensors",
        "vfmk/sam/weights/tiny.md",
    ):
        assert (unpacked / path).is_file(), path
    assert not (unpacked / "tests").exists()
    assert not (unpacked / "kernels").exists()


def test_runs_from_the_wheel(unpacked):
    assert backends_of(unpacked)["cpu"] == ""


def test_falls_back_and_says_why_without_the_library(unpacked):
    (unpacked / "vfmk" / "libvfmk.so").unlink()
    backends = backends_of(unpacked)
    assert "the native library was not built" in backends["cpu"]
    assert "the native library was not built" in backends["cuda"]
