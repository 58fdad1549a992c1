"""Memory of one call on a CPU, in a process of its own: `python -m bench.peak FILE`."""

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def peak_bytes(function: Callable[..., Tensor], direction: str, args: tuple[Tensor, ...]) -> int:
    """Memory of one call above what stood before it, model and inputs included; Linux only.

    A fresh process, so that what another contender left to malloc is not taken for free.
    `function` must pickle.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "call.pt"
        torch.save((function, direction, args, torch.get_num_threads()), file)
        command = [sys.executable, "-m", "bench.peak", str(file)]
        answer = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True)
    if answer.returncode != 0:
        raise RuntimeError(f"bench.peak failed: {answer.stderr.decode()}")
    return int(answer.stdout)


def main(file: str) -> None:
    from bench.harness import calls

    function, direction, args, threads = torch.load(file, weights_only=False)
    torch.set_num_threads(threads)
    call = calls(function, direction, [args])
    call()  # what is set up once, at the first call, is no part of a call
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_bytes("VmRSS")
    call()
    print(status_bytes("VmHWM") - before)


def status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"bench.peak: /proc/self/status has no {name}")


if __name__ == "__main__":
    main(sys.argv[1])
