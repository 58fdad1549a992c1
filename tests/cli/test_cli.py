"""The commands, as a person calls them."""

import json
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

import vfmk
from vfmk.cli import app
from vfmk.data.demo_scenes import demo_scenes


def test_info():
    result = CliRunner().invoke(app, ["info"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for word in ("vfmk", "torch", "dynamic_depthwise_conv2d", "reference"):
        assert word in result.output


def test_demo_on_a_folder(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for sample in demo_scenes("train", 4):
        Image.fromarray(sample.image).save(data / f"{sample.id}.jpg")
        Image.fromarray(sample.mask).save(data / f"{sample.id}.png")
    output = tmp_path / "report"
    arguments = ["demo", "--data", str(data), "--output", str(output), "--steps", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["held_out_samples"] == 2
    assert metrics["reloaded"] == metrics["adapted"]
    assert len(metrics["losses"]) == 2
    assert "frozen model" in (output / "report.md").read_text()
    for picture in ("grid.png", "loss.png"):
        with Image.open(output / picture) as image:
            assert min(image.size) > 100
    vfmk.AdaptedSam.from_pretrained(vfmk.load_sam("tiny"), output / "adapter")


@pytest.mark.parametrize("kind", ["missing", "without a mask"])
def test_demo_names_what_is_wrong_with_the_data(tmp_path, kind):
    data = tmp_path / "data"
    if kind == "without a mask":
        data.mkdir()
        Image.new("RGB", (8, 8)).save(data / "lonely.jpg")
    command = [sys.executable, "-c", "from vfmk.cli import app; app()"]
    finished = subprocess.run(
        [*command, "demo", "--data", str(data), "--output", str(tmp_path / "report")],
        capture_output=True,
        text=True,
    )
    assert finished.returncode != 0
    assert "Traceback" not in finished.stderr
    assert ("data does not exist" if kind == "missing" else "lonely.jpg") in finished.stderr
