"""Everything a GPU is needed for, in one command and one JSON: `python -m bench.gpu`.

Installs the package with a library for the GPU at hand, runs the tests marked `gpu`, then every
benchmark, whole models first, and writes bench/results/DEVICE-DATE.json with device, driver,
versions and commit. Each stage has a time limit, ten minutes together; what was measured by then is
written all the same. What was not goes into a further call, `-k NAME`, with a file of its own. The
exit status is 1 if a stage failed or was stopped. `--dry-run` goes the same way on a CPU at tiny
sizes, and keeps no result.
"""

import argparse
import datetime
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
INSTALL_SECONDS, CHECK_SECONDS, TEST_SECONDS = 150, 30, 120
MODEL_SECONDS, BENCHMARK_SECONDS = 170, 250  # the first within the second
STOP_SECONDS = 10  # for pytest to write what it has
MODELS = ("bench_step.py", "bench_adapter.py", "bench_sam.py")  # most precious first
LAST = ("bench_channel_remap.py", "bench_dynamic_depthwise_conv2d.py")  # have the most cases
NOTHING_MATCHED = 5  # pytest's exit status


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
    passed, measured = benchmarks(options.dry_run, options.k)
    if options.k and not measured and passed:
        sys.exit(f"bench.gpu: no benchmark matches -k {options.k!r}")
    failed = [stage for stage, ok in (("tests", tests["passed"]), ("bench", passed)) if not ok]
    if options.dry_run:
        print(f"dry run: {len(measured)} benchmarks ran; no result is kept")
    else:
        result = {**describe(), "tests": tests, "benchmarks": measured}
        write(result, options.output, options.k)
    if failed:
        sys.exit(f"bench.gpu: failed: {', '.join(failed)}")


def run(
    command: list[str], seconds: float | None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command in the root; past `seconds` it is interrupted, then killed, and has failed."""
    # A shell starts what it puts in the background deaf to interrupts, and children inherit that.
    hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=ROOT, text=True, preexec_fn=hear, **options)
    try:
        output, errors = process.communicate(timeout=seconds)
        return subprocess.CompletedProcess(command, process.returncode, output, errors)
    except subprocess.TimeoutExpired:
        print(f"bench.gpu: stopped after {seconds} s: {' '.join(command)}", file=sys.stderr)
        process.send_signal(signal.SIGINT)
    try:
        output, errors = process.communicate(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode or 1, output, errors)


def install() -> None:
    """Install the package in place, with a library built for the GPU at hand."""
    major, minor = torch.cuda.get_device_capability()
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "VFMK_CUDA": "1"}
    command = [sys.executable, "-m", "pip", "install", "--quiet"]
    command += ["--no-deps", "--no-build-isolation", "--editable", "."]
    if run(command, INSTALL_SECONDS, env=environment).returncode != 0:
        sys.exit("bench.gpu: the package could not be installed")


def check_backends(needed: tuple[str, ...]) -> None:
    """Nothing is measured unless every operator can run on what is to be measured."""
    script = "import json, vfmk; print(json.dumps(vfmk.backends()))"
    answer = run([sys.executable, "-c", script], CHECK_SECONDS, stdout=subprocess.PIPE)
    if answer.returncode != 0:
        sys.exit("bench.gpu: vfmk cannot be imported")
    for operator, backends in json.loads(answer.stdout).items():
        for backend in needed:
            if backends[backend] and "has no" not in backends[backend]:
                sys.exit(f"bench.gpu: {operator} on {backend}: {backends[backend]}")


def run_tests(dry_run: bool, expression: str) -> dict[str, Any]:
    """The tests that need a GPU; a dry run collects them."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", expression, "tests"]
    command += ["--collect-only"] if dry_run else ["-n", "8"]
    finished = run(command, TEST_SECONDS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    summary = (finished.stdout.strip().splitlines() or ["nothing was printed"])[-1]
    print(f"tests: {summary}")
    passed = finished.returncode in (0, NOTHING_MATCHED)
    if not passed:
        print(finished.stdout[-20_000:])
    return {"passed": passed, "summary": summary}


def benchmarks(dry_run: bool, expression: str) -> tuple[bool, list[dict[str, Any]]]:
    """Run bench/ under pytest-benchmark: whether all went well, and what was measured."""
    how = ["--device=cpu", "--smoke"] if dry_run else ["--device=cuda"]
    how += ["-k", expression]
    end = time.monotonic() + BENCHMARK_SECONDS
    passed, measured = run_benchmarks(MODELS, how, MODEL_SECONDS)
    passed_too, more = run_benchmarks(operator_benchmarks(), how, end - time.monotonic())
    return passed and passed_too, measured + more


def operator_benchmarks() -> list[str]:
    names = {path.name for path in (ROOT / "bench").glob("bench_*.py")}
    return sorted(names.difference(MODELS), key=lambda name: (name in LAST, name))


def run_benchmarks(
    files: Sequence[str], how: Sequence[str], seconds: float | None = None
) -> tuple[bool, list[dict[str, Any]]]:
    """The same of these files, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmarks.json"
        command = [sys.executable, "-m", "pytest", "-q", *(f"bench/{name}" for name in files)]
        command += ["--benchmark-json", str(path), "--benchmark-columns=median", *how]
        passed = run(command, seconds).returncode in (0, NOTHING_MATCHED)
        written = path.read_text() if path.exists() else ""
    measured = json.loads(written)["benchmarks"] if written else []
    kept = [{key: entry[key] for key in ("group", "name", "extra_info")} for entry in measured]
    return passed, [entry for entry in kept if entry["extra_info"]]


def write(result: dict[str, Any], folder: Path, ending: str) -> None:
    """One JSON, whole or not at all, with its tables and plot."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{result['device']} {datetime.date.today()} {ending}".strip().lower()
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', name)}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(path)
    print(f"wrote {path}")
    if result["benchmarks"]:
        subprocess.run([sys.executable, "-m", "bench.report", str(path)], cwd=ROOT, check=True)


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
