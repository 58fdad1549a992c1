"""The one command for a machine with a GPU goes through, as far as a CPU can show."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu

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


def test_a_failed_stage_is_named():
    finished = dry_run("-k", "nothing_has_this_name")
    assert finished.returncode == 1
    assert "bench.gpu: failed: tests, bench" in finished.stderr


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
