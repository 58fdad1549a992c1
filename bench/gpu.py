"""Everything a GPU is needed for, in one command and one JSON: `python -m bench.gpu`.

Installs the package with a library for the GPU at hand, runs the tests marked `gpu`, then every
benchmark, and writes bench/results/DEVICE-DATE.json with device, driver, versions and commit. It
stays within ten minutes. `--dry-run` goes the same way on a CPU at tiny sizes, and keeps no result.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("-k", default="", help="only tests and benchmarks that match")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("bench.gpu: no GPU is visible; --dry-run goes without")
    if not options.dry_run:
        install()
    check_backends(("cpu",) if options.dry_run else ("cuda", "triton"))
    tests = run_tests(options.dry_run, options.k)
    result = {**describe(), "tests": tests, "benchmarks": benchmarks(options.dry_run, options.k)}
    if options.dry_run:
        print(f"dry run: {len(result['benchmarks'])} benchmarks ran; no result is kept")
        return
    options.output.mkdir(parents=True, exist_ok=True)
    device = result["device"].lower().replace(" ", "-")
    path = options.output / f"{device}-{datetime.date.today()}.json"
    path.write_text(json.dumps(result, indent=1))
    print(f"wrote {path}")
    subprocess.run([sys.executable, "-m", "bench.report", str(path)], cwd=ROOT, check=True)


def install() -> None:
    """Install the package in place, with a library built for the GPU at hand."""
    major, minor = torch.cuda.get_device_capability()
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "VFMK_CUDA": "1"}
    command = [sys.executable, "-m", "pip", "install", "--quiet"]
    command += ["--no-deps", "--no-build-isolation", "--editable", "."]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def check_backends(needed: tuple[str, ...]) -> None:
    """Nothing is measured unless every operator can run on what is to be measured."""
    script = "import json, vfmk; print(json.dumps(vfmk.backends()))"
    answer = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True)
    for operator, backends in json.loads(answer.stdout).items():
        for backend in needed:
            if backends[backend] and "has no" not in backends[backend]:
                sys.exit(f"bench.gpu: {operator} on {backend}: {backends[backend]}")


def run_tests(dry_run: bool, expression: str) -> dict[str, Any]:
    """The tests that need a GPU; a dry run collects them."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", expression, "tests"]
    command += ["--collect-only"] if dry_run else ["-n", "8"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    summary = finished.stdout.strip().splitlines()[-1]
    print(f"tests: {summary}")
    if finished.returncode != 0:
        print(finished.stdout[-20_000:], finished.stderr[-2_000:])
    return {"passed": finished.returncode == 0, "summary": summary}


def benchmarks(dry_run: bool, expression: str) -> list[dict[str, Any]]:
    """Run bench/ under pytest-benchmark; one that fails is printed and left out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmarks.json"
        command = [sys.executable, "-m", "pytest", "-q", "bench", "-k", expression]
        command += ["--benchmark-json", str(path), "--benchmark-columns=median"]
        command += ["--device=cpu", "--smoke"] if dry_run else ["--device=cuda"]
        finished = subprocess.run(command, cwd=ROOT)
        if dry_run and finished.returncode != 0:
            sys.exit("bench.gpu: a benchmark failed")
        measured = json.loads(path.read_text())["benchmarks"]
    return [{key: entry[key] for key in ("group", "name", "extra_info")} for entry in measured]


def describe() -> dict[str, Any]:
    """Where and with what the figures were taken."""

    def output_of(*command: str) -> str:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    on_gpu = torch.cuda.is_available()
    return {
        "date": str(datetime.date.today()),
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_gpu
        else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": __import__("triton").__version__,
        "python": sys.version.split()[0],
    }


if __name__ == "__main__":
    main()
