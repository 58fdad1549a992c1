"""What this machine's CPU does, in one JSON: `python -m bench.cpu [-k EXPRESSION]`.

Runs every benchmark, or those that pytest's -k selects, and writes
bench/results/cpu-THREADS-DATE-NAME.json with versions and commit, as bench/gpu.py does for a GPU.
Nothing is written unless all went well.
"""

import argparse
import sys
from pathlib import Path

import torch

from bench import gpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", default="", help="only benchmarks that match")
    parser.add_argument("--name", help="ending of the JSON's name, by default the expression")
    parser.add_argument("--output", type=Path, default=gpu.RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    gpu.check_backends(("cpu",))
    files = [*gpu.MODELS, *gpu.operator_benchmarks()]
    passed, measured = gpu.run_benchmarks(files, ["--device=cpu", "-k", options.k])
    if not passed or not measured:
        sys.exit("bench.cpu: failed" if measured else "bench.cpu: nothing was measured")
    device = f"CPU {torch.get_num_threads()} threads"
    result = {**gpu.describe(), "device": device, "benchmarks": measured}
    gpu.write(result, options.output, options.name or options.k)


if __name__ == "__main__":
    main()
