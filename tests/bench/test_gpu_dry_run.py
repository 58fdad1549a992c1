"""The one command for a machine with a GPU goes through, as far as a CPU can show."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import cpu, gpu

ROOT = Path(__file__).parents[2]


def dry_run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", *options]
    # Seen from inside a parallel test run, pytest-benchmark would decline to measure.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_dry_run():
    finished = dry_run()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "benchmarks ran; no result is kept" in finished.stdout
    files = {path.name for path in (ROOT / "bench").glob("bench_*.py")}
    stages = [*gpu.MODELS, *gpu.operator_benchmarks()]
    assert sorted(stages) == sorted(files)
    for group in ("training step", "encoder with adapters, dense", "dynamic_conv2d"):
        assert group in finished.stdout


@pytest.fixture
def outside_xdist(monkeypatch):
    for variable in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(variable)


def test_a_failed_stage_is_named(monkeypatch, capsys, outside_xdist):
    """One that takes too long has failed; what others measured is kept."""
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--dry-run", "-k", "bench_pieces"])
    monkeypatch.setattr(gpu, "TEST_SECONDS", 0)
    with pytest.raises(SystemExit, match=r"bench\.gpu: failed: tests"):
        gpu.main()
    assert "dry run: 2 benchmarks ran" in capsys.readouterr().out


def test_nothing_matches(monkeypatch, outside_xdist):
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--dry-run", "-k", "nothing_has_this_name"])
    monkeypatch.setattr(gpu, "run_tests", lambda dry_run, expression: {"passed": True})
    with pytest.raises(SystemExit, match="no benchmark matches -k 'nothing_has_this_name'"):
        gpu.main()


def test_results_of_a_cpu(monkeypatch, tmp_path, capfd, outside_xdist):
    run_benchmarks = gpu.run_benchmarks
    monkeypatch.setattr(
        gpu, "run_benchmarks", lambda files, how: run_benchmarks(files, [*how, "--smoke"])
    )
    arguments = ["bench.cpu", "-k", "bench_pieces", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    cpu.main()
    plot, results = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert (plot.suffix, results.suffix) == (".png", ".json")
    assert results.name.startswith(f"cpu-{torch.get_num_threads()}-threads-")
    assert results.stem.endswith("-bench-pieces")
    assert len(json.loads(results.read_text())["benchmarks"]) == 2
    assert "plain PyTorch ÷ vfmk" in capfd.readouterr().out


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_a_stage_that_takes_too_long_is_stopped(capfd, handler):
    """Interrupted, it may still say what it has; its exit status 0 does not count.

    Also under a shell that ignores interrupts, as it does in the background.
    """
    script = """
import time
try:
    print("started", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("kept", flush=True)
"""
    before = signal.signal(signal.SIGINT, handler)
    try:
        start = time.monotonic()
        finished = gpu.run([sys.executable, "-c", script], 3, stdout=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 30
    assert finished.returncode != 0
    assert finished.stdout.split() == ["started", "kept"]
    assert "stopped after 3 s" in capfd.readouterr().err
