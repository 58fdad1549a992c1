"""Memory of one call on a CPU, in a process of its own: `python -m bench.peak FILE`."""

import ctypes
import gc
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def peak_bytes(make: Callable[[], Callable[[], Any]], standing: bool = False) -> int:
    """Memory of one call above what stood before it; with `standing`, and of all tensors that
    did. Linux only.

    A fresh process makes the call, so that what another contender left to malloc is not taken for
    free. `make` must pickle.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "call.pt"
        torch.save((make, standing, torch.get_num_threads()), file)
        command = [sys.executable, "-m", "bench.peak", str(file)]
        answer = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True)
    if answer.returncode != 0:
        raise RuntimeError(f"bench.peak failed: {answer.stderr.decode()}")
    return int(answer.stdout)


def main(file: str) -> None:
    make, standing, threads = torch.load(file, weights_only=False)
    torch.set_num_threads(threads)
    call = make()
    call()  # what is set up once, at the first call, is no part of a call
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_bytes("VmRSS") - (tensor_bytes() if standing else 0)
    call()
    print(status_bytes("VmHWM") - before)


def tensor_bytes() -> int:
    """Of all tensors that Python knows, each storage once."""
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"bench.peak: /proc/self/status has no {name}")


if __name__ == "__main__":
    main(sys.argv[1])
