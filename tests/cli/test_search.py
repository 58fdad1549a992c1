"""`vfmk search` and `vfmk apply`, as a person calls them."""

import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.channels.conftest import build_sam, build_samples
from vfmk.cli import app


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for sample in build_samples(5):
        Image.fromarray(sample.image).save(folder / f"{sample.id}.jpg", quality=100)
        Image.fromarray(sample.mask).save(folder / f"{sample.id}.png")
    return folder


@pytest.fixture(autouse=True)
def small_sam(monkeypatch):
    monkeypatch.setattr("vfmk.load_sam", lambda name, checkpoint: build_sam())


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_search_then_apply(data, tmp_path):
    out = tmp_path / "found"
    options = ("--data", data, "--limit", 3, "--top-n", 3)
    output = call("search", *options, "--out", out, "--strategy", "screened", "--audit", 5)
    assert "channels overwritten" in output
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["search_samples"], metrics["test"]["samples"]) == (3, 2)
    assert metrics["best_score"] > metrics["baseline"]
    saved = json.loads((out / "map.json").read_text())
    assert saved["pairs"] == metrics["pairs"]
    assert (saved["backend"], saved["samples"]) == ("tiny", 3)
    for picture in ("gains.png", "heat_map.png", "grid.png"):
        with Image.open(out / picture) as image:
            assert min(image.size) > 100
    spent = metrics["passes"]
    call("search", *options, "--out", out, "--strategy", "screened", "--audit", 5)
    again = json.loads((out / "metrics.json").read_text())
    assert again["passes"] < spent / 4  # gradients alone are not written down
    assert again["pairs"] == metrics["pairs"]
    assert again["known_scores"] > metrics["known_scores"] == 0
    assert "scores of an earlier run" in (out / "report.md").read_text()

    applied = tmp_path / "applied"
    arguments = ("--map", out / "map.json", "--search-data", data, "--limit", 3)
    assert "channels overwritten" in call("apply", *arguments, "--out", applied)
    test = json.loads((applied / "metrics.json").read_text())["test"]
    assert test == metrics["test"]
    low, high = test["gain_interval"]
    assert low <= test["remapped"] - test["frozen"] <= high


def test_mistakes_end_in_one_line(data, tmp_path):
    output = call("search", "--data", tmp_path / "no", "--out", tmp_path / "out", code=1)
    assert "does not exist" in output
    path = tmp_path / "map.json"
    path.write_text('{"pairs": [[1, 1]], "num_channels": 16}')
    arguments = ("--search-data", data, "--limit", 3, "--out", tmp_path / "out")
    assert "overwrites a channel by itself" in call("apply", "--map", path, *arguments, code=1)
    path.write_text('{"pairs": [[2, 1]], "num_channels": 16, "backend": "tiny"}')
    output = call("apply", "--map", path, "--search-data", data, "--out", tmp_path, code=1)
    assert "no samples to evaluate on beyond the 5 searched on" in " ".join(output.split())
    (tmp_path / "scores.jsonl").touch()
    arguments = ("--search-data", data, "--limit", 3, "--out", tmp_path)
    output = call("apply", "--map", path, *arguments, code=1)
    assert "holds a search; choose another folder by --out" in " ".join(output.split())
    options = ("--data", data, "--out", tmp_path, "--model", "vit_b")
    assert "'vit_b' comes without weights" in call("search", *options, code=1)


def test_apply_knows_for_which_model_a_map_is(data, tmp_path):
    path = tmp_path / "map.json"
    arguments = ("--map", path, "--search-data", data, "--limit", 3, "--out", tmp_path / "out")
    text = {"pairs": [[2, 1]], "num_channels": 16}
    path.write_text(json.dumps({**text, "backend": "sam_vit_b"}))
    output = call("apply", *arguments, code=1)
    assert "is a map for 'sam_vit_b', the model is 'tiny'" in " ".join(output.split())
    assert not (tmp_path / "out").exists()
    path.write_text(json.dumps({**text, "num_channels": 8, "backend": "tiny"}))
    output = call("apply", *arguments, code=1)
    assert "the map is for 8 channels, the embedding has 16" in output
    assert not (tmp_path / "out").exists()
    for backend in ({"backend": "tiny"}, {"backend": "mine"}, {}):
        path.write_text(json.dumps({**text, **backend}))
        told = "does not say for which" in " ".join(call("apply", *arguments).split())
        assert told == (backend != {"backend": "tiny"})


def test_never_on_images_searched_on(data, tmp_path):
    out = ("--out", tmp_path / "out")
    path = tmp_path / "map.json"
    path.write_text('{"pairs": [[2, 1]], "num_channels": 16, "backend": "tiny"}')
    same = ("--limit", 2, "--test-data", data)
    told = "the images of 2 of 5 test samples are searched on too"
    assert told in " ".join(call("search", "--data", data, *same, *out, code=1).split())
    same = ("--search-data", data, "--limit", 2, "--data", data)
    assert told in " ".join(call("apply", "--map", path, *same, *out, code=1).split())
    for file in data.glob("1.*"):  # of the 2 that are searched on, under another name
        shutil.copy(file, file.with_stem("copy"))
    output = call("search", "--data", data, "--limit", 2, *out, code=1)
    assert "the images of 1 of 4 test samples are searched on too" in " ".join(output.split())
    assert not (tmp_path / "out").exists()


def test_a_split_of_a_manifest_is_named(data, tmp_path):
    """Test lines come first here; without a split they would be searched on."""
    names = sorted(path.stem for path in data.glob("*.jpg"))
    manifest = data / "manifest.jsonl"
    lines = [
        {"split": split, "image": f"{name}.jpg", "mask": f"{name}.png"}
        for name, split in zip(names, ("test", "test", "val", "val", "val"), strict=True)
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--data", manifest, "--out", tmp_path / "out", "--strategy", "screened")
    output = " ".join(call("search", *options, code=1).split())
    assert "has the splits ['test', 'val'], asked for None" in output
    call("search", *options, "--split", "val", "--test-split", "test", "--top-n", 2)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["search_samples"], metrics["test"]["samples"]) == (3, 2)


def test_of_several_processes_the_first_alone_names_a_mistake(data, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = ["-m", "vfmk", "search", "--data", "no", "--out", "out"]
    ended = subprocess.run([*launch, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.count("vfmk search: load_samples: no does not exist") == 1
    assert "[rank1]" not in ended.stderr
    shutil.copytree(data, tmp_path / "test")
    arguments = ["-m", "vfmk", "search", "--data", "data", "--test-data", "test", "--out", "out"]
    ended = subprocess.run([*launch, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.count("vfmk search: the images of 5 of 5 test samples are searched on") == 1
    assert "[rank1]" not in ended.stderr


def test_several_processes_share_a_search(data, tmp_path):
    """Of the bundled model, whose weights each of them loads."""
    found = []
    options = ["--data", data, "--limit", 3, "--top-n", 3, "--strategy", "screened", "--keep", 0.03]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for out, command in (("one", [sys.executable]), ("two", launch)):
        arguments = [*command, "-m", "vfmk", "search", *options, "--out", tmp_path / out]
        ended = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("channels overwritten") == 2  # in one report
        found.append(json.loads((tmp_path / out / "metrics.json").read_text()))
    one, two = found
    assert (one["pairs"], one["passes"]) == (two["pairs"], two["passes"])
    assert one["best_score"] == pytest.approx(two["best_score"], abs=1e-6)
    assert one["test"]["samples"] == two["test"]["samples"] == 2
