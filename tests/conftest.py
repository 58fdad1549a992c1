"""What is built once for a test run, whichever worker of pytest-xdist needs it first."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

Built = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """built(name, make): what is of that name, which make(path) writes unless it is there."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def build(name: str, make: Callable[[Path], None]) -> Path:
        path = folder / name
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                make(path)
        return path

    return build
