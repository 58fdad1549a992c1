"""The one command for a machine with a GPU goes through, as far as a CPU can show."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_dry_run():
    command = [sys.executable, "-m", "bench.gpu", "--dry-run"]
    # Seen from inside a parallel test run, pytest-benchmark would decline to measure.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "benchmarks ran; no result is kept" in finished.stdout
